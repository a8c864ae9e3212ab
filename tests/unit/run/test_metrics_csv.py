"""metrics.csv: complete, growing, resumable."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from localfeat.run.loggers.metrics_csv import MetricsCsv, read_rows, read_series
from tests.helpers.tiny import TinyLearner, loader, trainer


def test_rows_columns_and_steps_of_a_real_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, logger=MetricsCsv(tmp_path), max_epochs=2)
    run.fit(TinyLearner(), loader(4), loader(1))
    rows = read_rows(tmp_path / "metrics.csv")
    assert list(rows[0])[:2] == ["step", "epoch"]
    assert [int(row["step"]) for row in rows] == list(range(8))
    assert [int(row["epoch"]) for row in rows] == [0] * 4 + [1] * 4
    assert [bool(row["val/accuracy"]) for row in rows] == [False, False, False, True] * 2
    assert all(row["train/module_2/loss"] for row in rows)


def test_every_row_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path)
    for step in range(3):
        logger.log_metrics({"a": step / 2}, step)
        assert read_series(logger.path)["a"] == [(s, s / 2) for s in range(step + 1)]
        logger.log_metrics({"a": step / 2, "epoch": 0}, step)
        assert len(read_rows(logger.path)) == step + 1


def test_new_columns_keep_old_rows(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path)
    logger.log_metrics({"b": 1.0}, 0)
    logger.log_metrics({"b": 2.0}, 1)
    logger.log_metrics({"a": 3.0}, 1)
    logger.log_metrics({"c": 4.0}, 2)
    logger.log_metrics({"c": 5.0})
    logger.finalize("success")
    assert logger.path.read_text() == "step,epoch,a,b,c\n0,,,1.0,\n1,,3.0,2.0,\n2,,,,5.0\n"
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_a_shorter_row_replaces_a_longer_one_cleanly(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path)
    logger.log_metrics({"a": 1.23456789}, 0)
    logger.log_metrics({"a": 1.0}, 0)
    logger.log_metrics({"a": 2.0}, 1)
    assert logger.path.read_text() == "step,epoch,a\n0,,1.0\n1,,2.0\n"


def test_resuming_keeps_what_the_checkpoint_has_seen(tmp_path: Path) -> None:
    first = MetricsCsv(tmp_path)
    for step in range(6):
        first.log_metrics({"a": float(step)}, step)
    with open(first.path, "a") as file:
        file.write("6,,0.1234")  # killed in the middle of a line
    second = MetricsCsv(tmp_path, resume_from_step=4)
    second.log_metrics({"a": 40.0, "b": 1.0}, 4)
    assert read_series(second.path) == {"a": [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)], "b": [(4, 1.0)]}


def test_resumed_training_leaves_the_same_rows_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(tmp_path, logger=MetricsCsv(whole), max_epochs=2).fit(TinyLearner(), loader(4), loader(1))
    killed = trainer(tmp_path, logger=MetricsCsv(parts), max_epochs=1)
    killed.fit(TinyLearner(), loader(4), loader(1))
    killed.save_checkpoint(tmp_path / "last.ckpt")
    resumed = trainer(tmp_path, logger=MetricsCsv(parts, resume_from_step=killed.global_step), max_epochs=2)
    resumed.fit(TinyLearner(), loader(4), loader(1), ckpt_path=tmp_path / "last.ckpt")
    columns = [
        [(r["step"], r["epoch"], bool(r["val/loss"])) for r in read_rows(f / "metrics.csv")] for f in (whole, parts)
    ]
    assert columns[0] == columns[1]


def test_a_new_run_keeps_an_earlier_file_under_another_name(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        MetricsCsv(tmp_path).log_metrics({"a": value}, 0)
    values = {name: read_series(tmp_path / name)["a"][0][1] for name in os.listdir(tmp_path)}
    assert values == {"metrics.1.csv": 1.0, "metrics.2.csv": 2.0, "metrics.csv": 3.0}


def test_cost_of_a_row_does_not_grow_with_the_file(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path)

    def seconds(start: int, count: int) -> float:
        begin = time.perf_counter()
        for step in range(start, start + count):
            logger.log_metrics({f"m{i}": 0.5 for i in range(10)}, step)
        return time.perf_counter() - begin

    early, _, late = seconds(0, 1000), seconds(1000, 6000), seconds(7000, 1000)
    assert late < 4 * early
    assert len(read_rows(logger.path)) == 8000


def test_nothing_is_written_before_the_first_figure_or_on_other_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = MetricsCsv(tmp_path / "run")
    logger.log_hyperparams({"lr": 1})
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero.rank_zero_only.rank", 1)
    logger.log_metrics({"a": 1.0}, 0)
    assert not (tmp_path / "run").exists()


def test_reading_a_missing_file_gives_nothing(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.csv") == [] and read_series(tmp_path / "metrics.csv") == {}

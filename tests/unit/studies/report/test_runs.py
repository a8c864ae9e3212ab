"""Folders that are damaged, half done or not of one run are named and left out; studies know what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from localfeat.studies.report.plots import plots
from localfeat.studies.report.rows import tables
from localfeat.studies.report.runs import read_material, read_runs
from localfeat.studies.report.series import loss_weights
from localfeat.studies.report.words import missing, progress
from localfeat.utils.errors import UserError
from tests.helpers.written import edit_summary, write_study, written_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs, ``good`` and ``bad``."""
    for name in ("good", "bad"):
        written_run(tmp_path / name, ["dataset=cifar10", "seed=0"], [0.5, 0.6], test_accuracy=0.625)
    return tmp_path


def cut(folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(text[: len(text) // 2])


def edit_config(folder: Path, **values: Any) -> None:
    config = OmegaConf.load(folder / "config.yaml")
    OmegaConf.save(OmegaConf.merge(config, values), folder / "config.yaml")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "summary.json cannot be read": lambda folder: cut(folder, "summary.json"),
    "summary.json cannot be read (it holds": lambda folder: (folder / "summary.json").write_text("[1]"),
    "it has no config.yaml": lambda folder: (folder / "config.yaml").unlink(),
    "config.yaml cannot be read": lambda folder: (folder / "config.yaml").write_text("a: [1"),
    "its config.yaml has no dataset": lambda folder: (folder / "config.yaml").write_text("seed: 1"),
    "metrics.csv has no val/accuracy 0.6": lambda folder: (folder / "metrics.csv").unlink(),
    "metrics.csv has no test/accuracy 0.9": lambda folder: edit_summary(folder, test_accuracy=0.9),
    "neither a test nor a validation": lambda folder: edit_summary(folder, test_accuracy=None, val_accuracy=None),
    "metrics.csv cannot be read": lambda folder: (folder / "metrics.csv").write_text("step,val/accuracy\n1,x\n"),
    "it has no image_size": lambda folder: edit_config(folder, image_size=None),
    "config.yaml says seed: x": lambda folder: edit_config(folder, seed="x"),
    "summary.json says overrides: [1]": lambda folder: edit_summary(folder, overrides=[1]),
    "summary.json says peak_memory_bytes: 3 GiB": lambda folder: edit_summary(folder, peak_memory_bytes="3 GiB"),
    "summary.json says commit.id: 7": lambda folder: edit_summary(folder, commit={"id": 7}),
    "it has no parameters.backbone": lambda folder: edit_summary(folder, parameters={"auxiliary": 1, "total": 1}),
    "it has no parameters": lambda folder: (folder / "summary.json").write_text(
        json.dumps({k: v for k, v in json.loads((folder / "summary.json").read_text()).items() if k != "parameters"})
    ),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_a_damaged_folder_is_named_in_one_line_and_left_out(runs: Path, said: str) -> None:
    DAMAGE[said](runs / "bad")
    material = read_material([runs])
    assert [run.folder.name for run in material.runs] == ["good"]
    (line,) = material.left_out
    assert said in line and "bad" in line and "\n" not in line
    assert missing(material) == [line]
    with pytest.raises(UserError, match=r"no finished run.*bad"):
        read_runs([runs / "bad"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"blocks": [1]}', '{"blocks": [{"block": 0, "knn": 0.5}]}'])
def test_a_damaged_inspection_is_named_and_its_run_stays(runs: Path, text: str) -> None:
    (runs / "bad" / "inspection").mkdir()
    (runs / "bad" / "inspection" / "inspection.json").write_text(text)
    material = read_material([runs])
    assert len(material.runs) == 2 and [run.inspection for run in material.runs] == [None, None]
    (line,) = material.left_out
    assert "inspection.json" in line and "\n" not in line


def test_runs_of_other_versions_have_their_row(runs: Path) -> None:
    """Keys that were not there yet, and one of a method that is not there any more."""
    config: Any = OmegaConf.load(runs / "bad" / "config.yaml")
    for key in ("test", "efficiency", "callbacks", "logger"):
        config.pop(key)
    config.method.no_longer = 1
    OmegaConf.save(config, runs / "bad" / "config.yaml")
    (table,) = tables(read_runs([runs]))
    assert len(table.rows) == 2 and len(list(plots(table))) >= 2
    assert [weights.rows for weights in loss_weights(table)] == [(table.rows[1],)]


def test_a_run_that_has_not_ended_is_named(runs: Path) -> None:
    (runs / "bad" / "summary.json").unlink()
    assert missing(read_material([runs])) == [f"{runs.name}/bad (has not ended)"]


def test_what_lies_in_a_runs_folder_is_no_run(runs: Path) -> None:
    for name in ("wandb/offline-run-1/files", ".hydra", "inspection", "checkpoints"):
        place = runs / "good" / name
        place.mkdir(parents=True)
        (place / "config.yaml").write_text("seed: 1")
    (runs / "wandb").mkdir()
    (runs / "wandb" / "config.yaml").write_text("seed: 1")
    material = read_material([runs])
    assert len(material.runs) == 2 and missing(material) == []


def test_a_study_says_what_is_missing_and_how_far_it_came(tmp_path: Path) -> None:
    jobs = [f"method={name}" for name in ("feature_recon", "e2e", "greedy_ce", "image_recon", "greedy_contrast")]
    write_study(tmp_path / "mine", "What?", jobs)
    for job in jobs[:4]:
        written_run(tmp_path / "mine" / job, ["dataset=cifar10", job], [0.5], test_accuracy=0.5)
    for job in jobs[2:4]:
        (tmp_path / "mine" / job / "summary.json").unlink()
    (tmp_path / "mine" / jobs[3] / "checkpoints").mkdir()
    (tmp_path / "mine" / jobs[3] / "checkpoints" / "last.ckpt").write_bytes(b"")
    material = read_material([tmp_path])
    assert missing(material) == [
        "mine: method=greedy_ce (unfinished, no checkpoint yet)",
        "mine: method=image_recon (unfinished, has a checkpoint)",
        "mine: method=greedy_contrast (not begun)",
    ]
    assert progress(material) == "2 runs, 2 of 5 jobs finished"
    (table,) = tables(material.runs, material.order())
    assert [row.method for row in table.rows] == ["feature_recon", "e2e"]  # the study's order


def test_a_damaged_study_is_named(runs: Path) -> None:
    (runs / "study.json").write_text('{"name": "x"}')
    assert "study.json is not a study's" in missing(read_material([runs]))[0]

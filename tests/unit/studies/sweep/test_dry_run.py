"""Predictions for jobs before they run: memory as measured, times from what is known, words that say from what."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localfeat.memory.accounting import step_memory
from localfeat.run.build import build_datamodule, build_learner
from localfeat.run.configuration import RunConfiguration
from localfeat.studies.sweep import measure
from localfeat.studies.sweep.command import compose_all, parse_speed
from localfeat.studies.sweep.dry_run import Row, rows, show, totals
from localfeat.studies.sweep.estimate import Costs, Finished, Speeds, cheapest, images_to_train, target
from localfeat.studies.sweep.folder import StudyFolder
from localfeat.studies.sweep.study import Job, load_study
from tests.helpers.command_line import call
from tests.helpers.whole_runs import SMALL

STUDY = f"""
question: Which?
overrides: {json.dumps([*SMALL, "trainer=auto"])}
jobs:
  - method=e2e seed=0,1
  - method=greedy_ce,feature_recon split=k2 seed=0,1
"""


def jobs_of(folder: Path, *typed: str) -> list[Job]:
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine" / "study.yaml").write_text(STUDY)
    return load_study(str(folder / "mine" / "study.yaml")).jobs(typed)


def configured(jobs: list[Job]) -> list[RunConfiguration]:
    return [RunConfiguration.from_values(values) for values in compose_all(jobs)]


def config_of(folder: Path, *typed: str) -> Any:
    """Of the first job with these overrides."""
    return configured(jobs_of(folder, *typed)[:1])[0]


@pytest.mark.parametrize("typed", [["method=e2e"], ["method=feature_recon"], ["method=greedy_ce", "trainer=cpu"]])
def test_peaks_are_those_of_a_whole_step(typed: list[str], tmp_path: Path) -> None:
    config = config_of(tmp_path, *typed)
    datamodule = build_datamodule(config)
    peak = step_memory(
        build_learner(config, datamodule.num_classes),
        batch_size=config.batch_size,
        image_size=config.image_size,
        target="cpu" if "trainer=cpu" in typed else "cuda",
        precision=config.trainer.precision,
        source=datamodule.source.example,
    ).peak_bytes
    known = Costs().of(config)
    assert known is not None and known[0] == pytest.approx(peak, rel=1e-3)
    assert target(config) == ("cpu" if "trainer=cpu" in typed else "cuda")


def test_costs_are_relative_to_end_to_end_training(tmp_path: Path) -> None:
    costs = Costs()
    whole, local = config_of(tmp_path, "method=e2e"), config_of(tmp_path, "method=feature_recon")
    assert costs.of(whole)[1] == 1  # type: ignore[index]
    assert costs.of(local)[1] > 1  # type: ignore[index]
    assert costs.of(replace(whole, efficiency=replace(whole.efficiency, compile=True))) is None
    balanced = config_of(tmp_path, "method=feature_recon", "split=balanced", "split.k=2")
    assert costs.of(balanced)[0] <= costs.of(local)[0]  # type: ignore[index]
    assert costs.work(config_of(tmp_path, "backbone.arguments.embed_dim=16")) > costs.work(whole)


@pytest.mark.parametrize("typed", [[], ["trainer.limit_train_batches=0.5"], ["trainer.max_steps=7"]])
def test_images_are_those_that_training_sees(typed: list[str], tmp_path: Path) -> None:
    config = config_of(tmp_path, "trainer.limit_train_batches=null", "epochs=2", *typed)
    datamodule = build_datamodule(config)
    datamodule.setup("fit")
    batches = len(datamodule.train_dataloader())
    expected = {"": 2 * batches, "limit": 2 * (batches // 2), "max": 7}
    assert images_to_train(config) == 16 * expected[typed[0].split(".")[1].split("_")[0] if typed else ""]


def test_images_of_the_papers_data_without_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = load_study("paper_pretrained").jobs(["method=e2e"])
    seen = {job.overrides[-1]: images_to_train(one) for job, one in zip(jobs, configured(jobs), strict=True)}
    # of 90 % for training, in batches of 128, for 100 epochs
    assert seen == {
        "dataset=cifar10": 351 * 12_800,
        "dataset=cifar100": 351 * 12_800,
        "dataset=stl10": 35 * 12_800,
        "dataset=svhn": 515 * 12_800,
    }
    assert list(tmp_path.iterdir()) == []


def test_what_a_speed_comes_from(tmp_path: Path) -> None:
    """Finished jobs of the same settings, else of the same backbone, else what the user says, else a measurement."""
    whole, local, greedy = (config_of(tmp_path, f"method={m}") for m in ("e2e", "feature_recon", "greedy_ce"))
    wide = config_of(tmp_path, "method=e2e", "backbone.arguments.embed_dim=16")
    costs = Costs()
    cost = {name: costs.of(c)[1] for name, c in (("local", local), ("greedy", greedy))}  # type: ignore[index]

    def speeds(given: float | None, *finished: tuple[Any, float]) -> Speeds:
        known = [(config, Finished(speed, 1.0)) for config, speed in finished]
        return Speeds(costs, known, given, lambda config: 50.0, whole)

    assert speeds(None).of(whole) == (50, "measured here")
    assert speeds(80).of(local) == (pytest.approx(80 / cost["local"]), "speed=")
    assert speeds(80).of(wide) == (pytest.approx(80 * costs.work(whole) / costs.work(wide)), "speed=")
    same = speeds(80, (local, 10), (local, 12), (local, 90))
    assert same.of(local) == (12, "finished jobs")
    found, basis = same.of(greedy)  # type: ignore[misc]
    assert found == pytest.approx(12 * cost["local"] / cost["greedy"]) and basis == "finished jobs of the same backbone"
    assert same.of(wide)[1] == "speed="  # type: ignore[index]
    assert cheapest([wide, local], costs) == local


def test_a_measurement_is_of_real_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 10.0, 12.0, 20.0, 20.5, 30.0, 31.0])  # a first step, then 2, 0.5 and 1 seconds
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert measure.images_per_second(config_of(tmp_path, "trainer=cpu")) == 4 / 0.5


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Every figure of it; a finished job as it was, and its speed for the others of its settings."""
    monkeypatch.chdir(tmp_path)
    jobs = jobs_of(tmp_path)
    folder = StudyFolder("out")
    done = folder.run(jobs[0].name)
    (done / ".hydra").mkdir(parents=True)
    (done / ".hydra" / "overrides.yaml").write_text("".join(f"- {json.dumps(o)}\n" for o in jobs[0].overrides))
    (done / "summary.json").write_text(json.dumps({"images_per_second": 0.5, "seconds": 3725.4}))
    before = sorted(tmp_path.rglob("*"))
    assert call(monkeypatch, "sweep", "study=mine/study.yaml", "folder=out", "dry=true") == 0
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written
    lines = capsys.readouterr().out.splitlines()
    costs = Costs()
    known = [costs.of(config) for config in configured(jobs)]
    images = 3 * 4 * 16  # epochs, batches, images
    seconds = [3725.4, images / 0.5, *(images / 0.5 * known[i][1] for i in (2, 3, 4, 5))]  # type: ignore[index]
    table = [re.fullmatch(r"(\w+) +([\d.]+) +([\d:]+)  (python .*)", line) for line in lines[3:9]]
    for i, (row, job) in enumerate(zip(table, jobs, strict=True)):
        assert row is not None
        hours, minutes, rest = map(int, row[3].split(":"))
        assert hours * 3600 + minutes * 60 + rest == pytest.approx(seconds[i], abs=0.51)
        assert row[1] == ("new" if i else "finished") and row[4] == job.command
        assert float(row[2]) == pytest.approx(known[i][0] / 2**30, abs=0.0051)  # type: ignore[index]
    assert lines[10].startswith("6 jobs (5 new, 0 unfinished, 0 running, 1 finished): ")
    assert "predicted for cuda" in lines[11]
    assert lines[12].startswith("time: 1 jobs as measured") and "1 jobs by the speed of finished jobs" in lines[13]
    assert lines[14].startswith("time: 4 jobs by the speed of finished jobs with the same backbone")


def test_totals() -> None:
    job = Job("a", ())
    found = [
        Row(job, "finished", 2**30, 3600.0, "measured"),
        Row(job, "unfinished", 3 * 2**29, 61.0, "speed="),
        Row(job, "new", None, None, None),
    ]
    assert totals(found) == (
        "3 jobs (1 new, 1 unfinished, 0 running, 1 finished): 1:01:01 one after the other, 0:01:01 left; "
        "largest peak 1.50 GiB"
    )


def test_unknown_times_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    typed = ["method=e2e", "seed=0", "efficiency=compile"]
    jobs = jobs_of(tmp_path, *typed)
    study = load_study(str(tmp_path / "mine" / "study.yaml"))
    show(study, jobs, configured(jobs), StudyFolder(tmp_path / "out"), 10.0)
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"new +– +– +python", lines[3]) and "unknown for 1 jobs" in lines[-1]


def test_weights_are_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    jobs = jobs_of(tmp_path, "backbone.pretrained=true", "method=e2e", "seed=0")
    monkeypatch.setattr(measure, "STEPS", 1)
    (row,) = rows(jobs, configured(jobs), StudyFolder(tmp_path / "out"), None)
    assert row.basis == "measured here" and row.seconds and row.seconds > 0


def test_speeds_as_typed() -> None:
    assert (parse_speed(None), parse_speed("800"), parse_speed("0.5")) == (None, 800, 0.5)

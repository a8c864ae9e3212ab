"""Sweeps of real runs: the paper's studies made small, and a job that is cut short."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch.callbacks import Callback

from localfeat.run import train as training
from localfeat.run.command import run
from localfeat.run.folder import RunFolder
from localfeat.studies.sweep.study import Job, load_study
from localfeat.studies.sweep.task import RunJob
from tests.helpers.command_line import call
from tests.helpers.formats import write_source
from tests.helpers.sweeps import until
from tests.helpers.whole_runs import SMALL, TINY_SWIN, composed, draw_nothing, files_below, metrics

ONE = [
    *TINY_SWIN,
    "image_size=32",
    "batch_size=10",
    "epochs=1",
    "trainer=cpu",
    "callbacks.progress_bar=false",
    "dataset.val_fraction=0.34",
    "dataset.download=false",
    "backbone.pretrained=false",
    *(f"trainer.limit_{stage}_batches=1" for stage in ("train", "val", "test")),
]
NOT_EQUAL = ("seconds", "images_per_second", "command", "commit")


class InProcess:
    """A job's process that is none: starting it trains in this one. What Hydra would note is noted."""

    pid = os.getpid()

    def __init__(self, sweep: RunJob, job: Job, lock: int, *, resume: bool) -> None:
        assert not resume
        noted(sweep.folder.run(job.name), job)
        run(composed(*job.overrides), sweep.folder.run(job.name))

    def wait(self) -> int:
        return 0


def noted(folder: Path, job: Job) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {json.dumps(o)}\n" for o in job.overrides))


STUDIES = {
    "paper_pretrained": ["dataset=stl10", "split=k4", "decoder=deconv"],
    "paper_scratch": ["dataset=cifar10", "method=e2e,greedy_ce", "split=k2", "seed=0"],
    "paper_ablation": ["method=e2e,greedy_contrast", "split=k2", "seed=1"],
    "paper_variants": ["backbone=swin_micro", "method=e2e,feature_recon"],
}


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.slow
def test_two_jobs_of_each_study_of_the_paper(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the file, but small: every job ends, and was what its name says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RunJob, "_start", lambda *given, resume: InProcess(*given, resume=resume))
    draw_nothing(monkeypatch)
    typed = [*STUDIES[name], *ONE]
    jobs = load_study(name).jobs(typed)
    for dataset in {o for job in jobs for o in job.overrides if o.startswith("dataset=")}:
        write_source(monkeypatch, dataset.removeprefix("dataset="), tmp_path / "data")
    wanted = jobs if len(jobs) == 2 else jobs[:2]
    for job in wanted:
        code = call(monkeypatch, "sweep", f"study={name}", "folder=out", f"job={job.name}", *typed)
        assert code == 0
    for job in wanted:
        folder = tmp_path / "out" / job.name
        chosen = dict(override.split("=", 1) for override in job.name.split(","))
        summary, config = json.loads((folder / "summary.json").read_text()), RunFolder(folder).read_config()
        assert summary["method"] == chosen["method"] and summary["seed"] == int(chosen.get("seed", 0))
        assert len(summary["split"]) == (1 if chosen["method"] == "e2e" else int(chosen["split"][1:]))
        assert config["dataset"]["source"] == chosen.get("dataset", config["dataset"]["source"])
        assert "backbone.safetensors" in files_below(folder)


def equal_parts(folder: Path) -> dict[str, Any]:
    """What two runs of one configuration share: the summary and the metrics without times."""
    summary = json.loads((folder / "summary.json").read_text())
    kept = {key: value for key, value in summary.items() if key not in NOT_EQUAL}
    return {**kept, "metrics": metrics(folder)}


def study_file(folder: Path, lines: str) -> str:
    (folder / "tiny").mkdir()
    file = folder / "tiny" / "study.yaml"
    file.write_text(f"question: Which?\noverrides: {json.dumps(SMALL)}\njobs: {lines}\n")
    return str(file)


class Lost(Exception):
    """What ends a run before its time."""


class LoseAt(Callback):
    """Ends the run in an epoch, counted from 0, after its second batch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: lightning.Trainer, _: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 2:
            raise Lost


@pytest.mark.slow  # as the next one, of which it is a part
def test_a_job_that_was_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep resumes it in a process of its own; it ends as one that was never interrupted."""
    monkeypatch.chdir(tmp_path)
    study = study_file(tmp_path, "['method=greedy_ce split=k2']")
    (job,) = load_study(study).jobs()
    cut, whole = tmp_path / "out" / job.name, tmp_path / "whole"
    for folder in (cut, whole):
        noted(folder, job)
    with monkeypatch.context() as patch, pytest.raises(Lost):
        build = training.build_callbacks
        patch.setattr(training, "build_callbacks", lambda *a, **k: [LoseAt(2), *build(*a, **k)])
        run(composed(*job.overrides), cut)
    assert call(monkeypatch, "sweep", f"study={study}", "folder=out") == 0
    run(composed(*job.overrides), whole)
    assert equal_parts(cut) == equal_parts(whole)
    assert len(metrics(whole)) > 3


def reported(folder: Path, output: Path, patch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The rows of a study's report, without what was timed and the commit, which may be made in between."""
    assert call(patch, "report", str(folder), f"output={output}") == 0
    lines = list(csv.DictReader((output / "report.csv").open()))
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "commit", "notes")} for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(900)  # eight processes that import torch
def test_a_sweep_killed_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of the sweep and of its job; restarted, the study is that of a sweep that nothing happened to."""
    study = study_file(tmp_path, "['method=e2e,greedy_ce,feature_recon split=k2']")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[4]), "OMP_NUM_THREADS": "1"}

    def sweep(folder: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "localfeat.studies.sweep", f"study={study}", f"folder={folder}"]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    first, second, _ = (job.name for job in load_study(study).jobs())
    killed = sweep("out")
    until((tmp_path / "out" / second / "metrics.csv").exists)
    killed.kill()
    (events,) = (tmp_path / "out" / "logs").glob(".events-*")
    pid = [json.loads(line) for line in events.read_text().splitlines()][-1]["pid"]
    os.kill(pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "out" / second / "summary.json").exists()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / first).rglob("*")}
    again = sweep("out")
    out, _ = again.communicate()
    assert again.returncode == 0 and "3 jobs: 1 done before, 0 elsewhere, 2 to run" in out
    assert {file: file.stat().st_mtime_ns for file in before} == before
    sweep("whole").communicate()
    for job in load_study(study).jobs():
        assert equal_parts(tmp_path / "out" / job.name) == equal_parts(tmp_path / "whole" / job.name)
    monkeypatch.setattr("localfeat.studies.report.write.plots", lambda table: ())
    found, expected = (reported(tmp_path / name, tmp_path / f"report_{name}", monkeypatch) for name in ("out", "whole"))
    assert found == expected and [row["method"] for row in found] == ["e2e", "greedy_ce", "feature_recon"]

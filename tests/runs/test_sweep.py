"""``localfeat sweep``: jobs in their own processes, and what happens if they or the sweep fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from localfeat.studies.sweep import launch, task
from tests.helpers.sweeps import E2E, K2, K4, Place, until

PENDING = "localfeat.studies.sweep study=mine/study.yaml folder=out"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def test_every_job_leaves_a_run(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    assert place.sweep() == 0
    assert place.attempts() == [["anew"], ["anew"], ["anew"]]
    for name in (E2E, K2, K4):
        overrides = json.loads(place.summaries()[name])["overrides"]
        assert overrides == ["epochs=3", *name.split(",")]
        assert (place.folder / "out" / "logs" / f"{name}.log").read_text() == f"said {name}\n"
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "3 jobs: 0 done before, 0 elsewhere, 3 to run"
    begun, ended = [line for line in lines if " begins" in line], [line for line in lines if " done in " in line]
    assert [line.split()[0] for line in begun] == [line.split()[0] for line in ended] == [E2E, K2, K4]
    assert begun[0].endswith("| 0 done, 0 failed, 1 running, 2 left")
    assert "| 2 done, 0 failed, 0 running, 1 left, about 0:00:0" in ended[1]
    assert ended[2].endswith("| 3 done, 0 failed, 0 running, 0 left")
    assert lines[-2:] == ["3 of 3 jobs done, 0 failed", "localfeat report out"]
    study = json.loads((place.folder / "out" / "study.json").read_text())
    assert (study["name"], study["question"]) == ("mine", "Which?")
    assert study["jobs"][1] == {
        "name": K2,
        "overrides": ["epochs=3", "method=feature_recon", "split=k2", "seed=0"],
        "command": "python -m localfeat.run epochs=3 method=feature_recon split=k2 seed=0",
    }
    assert [job["name"] for job in study["jobs"]] == [E2E, K2, K4]


def test_a_job_that_cannot_be_run(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.patch.setattr(task, "PROGRAM", ("/nowhere/python",))
    assert place.sweep("method=e2e") == 1
    printed = capfd.readouterr()
    assert printed.err.startswith("error: a job could not be run: FileNotFoundError: ")
    assert "0 of 1 jobs done, 1 failed" in printed.out


def test_finished_jobs_are_left_alone(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    assert place.sweep("method=e2e") == 0
    before = {file: file.stat().st_mtime_ns for file in place.job(E2E).rglob("*")}
    capfd.readouterr()
    assert place.sweep() == 0
    assert capfd.readouterr().out.startswith("3 jobs: 1 done before, 0 elsewhere, 2 to run\n")
    assert place.attempts() == [["anew"], ["anew"], ["anew"]]
    assert {file: file.stat().st_mtime_ns for file in place.job(E2E).rglob("*")} == before
    assert place.sweep("split=k2") == 0  # study.json keeps jobs that have runs
    assert len(json.loads((place.folder / "out" / "study.json").read_text())["jobs"]) == 3


def test_the_others_survive_a_failure(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.behave(e2e=[0, "fail"], k2=[2, "die"], k4=[1, "nothing"])
    assert place.sweep() == 1
    out = capfd.readouterr().out
    log = place.folder / "out" / "logs" / f"{E2E}.log"
    assert "it failed" in log.read_text()
    assert (
        f"{E2E} FAILED" in out
        and f"(exit code 1, error: it failed): {log} | 0 done, 1 failed, 0 running, 2 left" in out
    )
    assert f"{K2} FAILED" in out and "(killed, possibly out of memory)" in out
    assert f"{K4} FAILED" in out and "(exit code 0)" in out
    assert out.splitlines()[-5:-1] == [
        *(f"failed: {name}: {log.with_name(name + '.log')}" for name in (E2E, K2, K4)),
        "0 of 3 jobs done, 3 failed",
    ]
    place.behave()
    assert place.sweep() == 0
    assert place.attempts() == [["anew", "anew"], ["anew", "resume"], ["anew", "resume"]]
    interrupted = place.summaries()
    shutil.rmtree(place.folder / "out")
    assert place.sweep() == 0
    assert place.summaries() == interrupted


@pytest.mark.slow
def test_a_killed_sweep(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """Its job keeps running and keeps its lock; the same command again runs the other jobs."""
    place.behave(k2=[1, "wait"])
    sweep = place.start()
    until((place.job(K2) / "here").exists)
    sweep.kill()
    sweep.communicate()
    finished = place.job(E2E) / "summary.json"
    before = finished.stat().st_mtime_ns
    assert place.sweep() == 0
    out = capfd.readouterr().out
    assert f"{K2} is skipped: another process is training it\n" in out
    assert "3 jobs: 1 done before, 1 elsewhere, 1 to run\n" in out and "2 of 3 jobs done, 0 failed" in out
    assert place.attempts() == [["anew"], ["anew"], ["anew"]]
    (place.folder / "go").touch()
    until((place.job(K2) / "summary.json").exists)
    until(lambda: place.sweep() == 0 and "3 done before" in capfd.readouterr().out)
    assert place.attempts() == [["anew"], ["anew"], ["anew"]] and finished.stat().st_mtime_ns == before


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.slow
def test_a_sweep_that_is_told_to_stop(name: str, code: int, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.behave(k2=[1, "wait"])
    sweep = place.start()
    until((place.job(K2) / "here").exists)
    os.kill(sweep.pid, getattr(signal, name))
    out, error = sweep.communicate(timeout=60)
    assert (sweep.returncode, error) == (code, "")
    assert "ending 1 running jobs" in out
    assert out.splitlines()[-1].startswith("stopped with 1 of 3 jobs done; resume with: localfeat sweep study=")
    assert place.attempts() == [["anew"], ["anew"], []]
    (place.folder / "go").touch()
    assert place.sweep() == 0
    assert place.attempts() == [["anew"], ["anew", "resume"], ["anew"]]
    assert [path.name for path in (place.folder / "out" / "logs").glob(".*")] == []


@pytest.mark.slow
def test_side_by_side(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """With joblib, two jobs can wait for each other."""
    place.behave(e2e=[0, "meet"], k4=[0, "meet"])
    assert place.sweep("launcher=joblib", "hydra.launcher.n_jobs=3", "split=k4") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[2].endswith("| 0 done, 0 failed, 2 running, 0 left") and lines[-2] == "2 of 2 jobs done, 0 failed"
    assert place.attempts() == [["anew"], [], ["anew"]]


@pytest.mark.slow
def test_with_submitit(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.behave(e2e=[0, "meet"], k4=[0, "meet"], k2=[2, "fail"])
    assert place.sweep("launcher=submitit_local") == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[-2] == "2 of 3 jobs done, 1 failed" and lines[-3].startswith(f"failed: {K2}: ")
    place.behave()
    assert place.sweep("launcher=submitit_local") == 0
    assert place.attempts() == [["anew"], ["anew", "resume"], ["anew"]]


def test_a_folder_with_other_runs_is_refused(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.behave(k2=[1, "fail"])
    assert place.sweep("split=k2") == 1
    before = {file: file.read_bytes() for file in (place.folder / "out").rglob("*") if file.is_file()}
    capfd.readouterr()
    assert place.sweep("epochs=4") == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == (
        f"error: {place.job(E2E)} holds a run of another configuration (epochs=3, now epochs=4); "
        "give the study another folder=<folder>, or move this one away\n"
    )
    assert place.sweep("epochs=4", "method=feature_recon", "split=k2") == 2  # an unfinished run is not overwritten
    assert {file: file.read_bytes() for file in (place.folder / "out").rglob("*") if file.is_file()} == before
    (place.job(E2E) / ".hydra" / "overrides.yaml").unlink()
    assert place.sweep() == 2
    assert "it has no .hydra/overrides.yaml" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("file", "content"),
    [("summary.json", ""), ("summary.json", "[]"), ("summary.json", b"\xff"), (".hydra/overrides.yaml", "- [a")],
)
def test_a_damaged_file_of_a_finished_job_is_one_line(
    file: str, content: str | bytes, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is run or overwritten."""
    assert place.sweep("method=e2e") == 0
    damaged = place.job(E2E) / file
    damaged.write_bytes(content if isinstance(content, bytes) else content.encode())
    for typed in ([], ["dry=true"]):
        capfd.readouterr()
        assert place.sweep(*typed) == 2
        printed = capfd.readouterr()
        assert printed.err.startswith(f"error: {damaged} ") and printed.err.count("\n") == 1 and not printed.out
    assert place.attempts() == [["anew"], [], []]


def test_a_folder_that_cannot_be_written_to(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    (place.folder / "out").write_text("a file")
    assert place.sweep() == 2
    assert capfd.readouterr().err == f"error: folder={place.folder / 'out'} cannot be written to (Not a directory)\n"
    assert (place.folder / "out").read_text() == "a file"


@pytest.mark.parametrize("name", [pytest.param("SIGINT", marks=pytest.mark.slow), "SIGTERM"])
def test_told_to_stop_while_a_job_starts(name: str, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """A process that has not been reported yet is ended with the others."""
    place.behave(e2e=[1, "wait"])
    begin = task.RunJob._start

    def interrupted(*given: Any, **named: Any) -> Any:
        process = begin(*given, **named)
        signal.raise_signal(getattr(signal, name))
        return process

    place.patch.setattr(task.RunJob, "_start", interrupted)
    assert place.sweep() == 128 + getattr(signal, name)
    assert "ending 1 running jobs" in capfd.readouterr().out
    assert place.attempts()[1:] == [[], []]
    place.patch.setattr(task.RunJob, "_start", begin)
    (place.folder / "go").touch()
    assert place.sweep() == 0
    assert "elsewhere" in (out := capfd.readouterr().out) and " 0 elsewhere, 3 to run" in out


def test_ctrl_c_before_the_first_job_is_one_line(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    place.patch.setattr("localfeat.studies.sweep.command.run", interrupt)
    assert place.sweep() == 130
    assert capfd.readouterr().err == "interrupted\n"


def test_a_folder_with_any_name(place: Place) -> None:
    place.patch.setitem(os.environ, "PYTHONUTF8", "1")
    folder = 'my folder, it\'s "größer"=1 [a] {b} $c'
    assert place.sweep(f"folder={folder}") == 0
    assert len(list((place.folder / folder).glob("*/summary.json"))) == 3
    assert place.sweep(f"folder={folder}") == 0


def test_what_changes_no_result_may_differ(place: Place) -> None:
    assert place.sweep("method=e2e") == 0
    assert place.sweep("dataset.root=/elsewhere", "dataset.num_workers=1", "callbacks.progress_bar=false") == 0
    assert place.attempts() == [["anew"], ["anew"], ["anew"]]


def test_one_job(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    assert place.sweep(f"job={K2}") == 0
    assert place.attempts() == [[], ["anew"], []]
    assert len(json.loads((place.folder / "out" / "study.json").read_text())["jobs"]) == 3
    assert place.sweep("job=method=e2e,seed=1") == 2
    assert f"did you mean {E2E}?" in capfd.readouterr().err


def test_a_study_is_a_group_of_wandb_runs(place: Place) -> None:
    typed = ["method=e2e", "logger=wandb"]
    assert place.sweep(*typed) == 0
    overrides = json.loads(place.summaries()[E2E])["overrides"]
    assert overrides[-2:] == ["logger.group='mine'", f"logger.name='{E2E}'"]
    assert place.sweep("method=e2e") == 0  # a logger changes no result
    shutil.rmtree(place.folder / "out")
    assert place.sweep(*typed, "logger.group=ours") == 0
    overrides = json.loads(place.summaries()[E2E])["overrides"]
    assert "logger.group=ours" in overrides and "logger.group='mine'" not in overrides


LINES = {
    "study=mine/study.yaml seed": "seed: arguments are key=value",
    "folder=out": "study has to be given",
    "study=nothing": "study=nothing: there is no experiments/nothing/study.yaml",
    "study=mine/study.yaml launcher=ray": "launcher=ray: it is one of basic, joblib, submitit_local, submitit_slurm",
    "study=mine/study.yaml dry=perhaps": "dry=perhaps: it is true or false",
    "study=mine/study.yaml speed=-3": "speed=-3: it must be images per second",
    "study=mine/study.yaml folder=": "folder=: give a folder",
    "study=mine/study.yaml resume=x": "resume=x: the sweep sets this itself",
    "study=mine/study.yaml hydra.run.dir=x": "hydra.run.dir=x: the sweep sets this itself",
    "study=mine/study.yaml epoch=3": "epoch: there is no such key; did you mean epochs?",
    "study=mine/study.yaml luncher=joblib": "luncher: there is no such key; did you mean launcher?",
    "study=mine/study.yaml dryy=true": "dryy: there is no such key; did you mean dry?",
    "study=mine/study.yaml method=foo": "method=foo: it is one of auglocal, deep_supervision, dgl, e2e, ",
    "study=": "study=: there is no ",
    "study=mine/study.yaml job=": "job=: ",
    "study=mine/study.yaml seed=": "seed=: give a value",
    "study=mine/study.yaml launcher=": "launcher=: it is one of",
    "study=mine/study.yaml speed=": "speed=: it must be images per second",
    "study=mine/study.yaml method=e2e launcher=joblib hydra.launcher.n_jobs=0": "launcher=joblib: n_jobs == 0",
    "study=mine/study.yaml method=e2e launcher=joblib hydra.launcher.n_jobs=two": "Error merging override",
    "study=mine/study.yaml hydra.launcher.n_job=2 launcher=joblib": "hydra.launcher.n_job",
}


@pytest.mark.parametrize("typed", LINES)
def test_is_refused_in_one_line(typed: str, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    from tests.helpers.command_line import call

    assert call(place.patch, "sweep", *typed.split()) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith(f"error: {LINES[typed]}") and printed.err.count("\n") == 1
    assert place.attempts() == [[], [], []]


def test_a_missing_launcher_names_its_extra(place: Place, capfd: Any) -> None:
    find = launch.find_spec
    place.patch.setattr(launch, "find_spec", lambda name: None if "joblib" in name else find(name))
    assert place.sweep("launcher=joblib") == 2
    assert capfd.readouterr().err == "error: launcher=joblib is not installed: pip install 'localfeat[sweep]'\n"

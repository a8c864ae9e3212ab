"""Signals: the current batch is finished and saved, the run resumes bit for bit, a second signal ends it at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localfeat.run import signals as stopping
from localfeat.run.command import run
from localfeat.run.signals import StopRequest, requeue
from localfeat.utils.errors import Stopped
from tests.helpers.command_line import call
from tests.helpers.whole_runs import (
    BATCHES,
    SMALL,
    At,
    checkpoint,
    child_exit,
    composed,
    draw_nothing,
    lose_reader,
    made_once,
    small_run,
    watched_by,
)
from tests.runs.test_run import VARIANTS, assert_same_run

ALL = ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"]
ACCUMULATED = "feature_recon bf16 averaged and accumulated"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


@pytest.fixture(autouse=True)
def same_handlers() -> Iterator[None]:
    """Assert that a run restores the previous signal handlers."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in stopping.SIGNALS} == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function for folder and summary of a variant's uninterrupted run, made once."""
    return made_once(tmp_path_factory, VARIANTS)


def send(name: str) -> Any:
    return lambda: os.kill(os.getpid(), getattr(signal, name))


MOMENTS: dict[str, tuple[str, int, int, int]] = {
    # hook, epoch, batches started in it, batches in last.ckpt
    "before a batch": ("on_train_batch_start", 1, 2, BATCHES + 2),
    "after a batch": ("on_train_batch_end", 1, 3, BATCHES + 3),
    "before an epoch's last batch": ("on_train_batch_start", 1, BATCHES, 2 * BATCHES),
    "before the first batch": ("on_train_batch_start", 0, 0, 1),
    "in validation": ("on_validation_batch_start", 1, 0, 2 * BATCHES),
    "before the last epoch ends": ("on_validation_end", 2, 0, 3 * BATCHES),
    "after training": ("on_train_end", 3, 0, 3 * BATCHES),
}


QUICK = ("in validation",)


@pytest.mark.parametrize(
    ("variant", "moment", "name"),
    [
        *[
            pytest.param(ACCUMULATED, moment, "SIGTERM", marks=[] if moment in QUICK else pytest.mark.slow)
            for moment in MOMENTS
        ],
        ("feature_recon", "before a batch", "SIGINT"),
        *[pytest.param("feature_recon", "before a batch", name, marks=pytest.mark.slow) for name in ALL[1:]],
        pytest.param("greedy_contrast by epochs", "after a batch", "SIGINT", marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_is_as_never_stopped(
    variant: str, moment: str, name: str, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook, epoch, batches, saved = MOMENTS[moment]
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        watched_by(patch, At(hook, send(name), epoch, batches))
        small_run(folder, *VARIANTS[variant])
    assert stopped.value.signum == getattr(signal, name)
    assert checkpoint(folder)["global_step"] == saved
    assert_same_run(folder, run(composed(f"resume={folder}"), "not used"), whole(variant))


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), pytest.param("SIGTERM", 143, marks=pytest.mark.slow)])
def test_command_line_says_how_to_resume(
    name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my run"
    watched_by(monkeypatch, At("on_train_batch_start", send(name), 0, 2))
    assert call(monkeypatch, "run", *SMALL, f"hydra.run.dir={folder}") == code
    said = capfd.readouterr().err.splitlines()
    assert said[-2:] == [
        f"{name}: saving after this batch; a second signal ends at once",
        f"stopped by {name}; resume with: python -m localfeat.run resume='{folder}'",
    ]
    assert call(monkeypatch, "run", f"resume='{folder}'") == 0
    assert (folder / "summary.json").exists() and not (folder / "checkpoints" / "previous.ckpt").exists()


def test_a_second_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal is not handled again: the parent sees a process that it has ended."""
    folder = tmp_path / "run"

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("still alive")

    watched_by(monkeypatch, At("on_train_batch_start", twice, 1, 2))
    assert child_exit(lambda: small_run(folder, "method=greedy_ce")) == -signal.SIGTERM
    assert checkpoint(folder)["global_step"] == BATCHES  # the previous checkpoint


@pytest.mark.parametrize("where", ["localfeat.run.train.build_learner", "localfeat.run.train._load_best"])
def test_before_and_after_training_it_ends_where_it_is(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still here")

    monkeypatch.setattr(where, interrupted)
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "run", *SMALL, "epochs=1", "hydra.run.dir=outputs/mine") == 130
    said = capfd.readouterr().err.splitlines()[-1]
    if "build" in where:
        assert said == "stopped by SIGINT" and not Path("outputs").exists()
    else:
        assert said == f"stopped by SIGINT; resume with: python -m localfeat.run resume={tmp_path}/outputs/mine"


def test_ignored_signals_stay_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nohup, and shells that start background jobs, set signals to be ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        watched_by(monkeypatch, At("on_train_batch_start", send("SIGHUP"), 0, 2))
        assert small_run(tmp_path / "run", "epochs=1", "method=greedy_ce")["epochs"] == 1
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_sweep_of_hydras_stops_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched_by(monkeypatch, At("on_train_batch_start", send("SIGINT"), 0, 1))
    sweep = [*SMALL, "epochs=1", "method=greedy_ce", "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep"]
    assert call(monkeypatch, "run", "-m", *sweep) == 130
    assert (tmp_path / "sweep" / "0" / "checkpoints" / "last.ckpt").exists() and not (tmp_path / "sweep" / "1").exists()


# --- Slurm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a stand-in that records its arguments and fails for job 13."""
    program, notes = tmp_path / "bin" / "scontrol", tmp_path / "asked"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> "{notes}"\ncase "$2" in 13) echo "no such\njob" >&2; exit 1;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return notes


def test_requeue_names_the_job(scontrol: Path) -> None:
    usr1 = signal.SIGUSR1
    assert requeue(usr1, {"SLURM_JOB_ID": "7"}) == "Slurm job 7 was requeued"
    task = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "3"}
    assert requeue(usr1, task) == "Slurm job 8_3 was requeued"
    assert requeue(usr1, {"SLURM_JOB_ID": "13"}) == "Slurm job 13 was not requeued: no such job"
    assert scontrol.read_text().splitlines() == ["requeue 7", "requeue 8_3", "requeue 13"]
    assert requeue(usr1, {}) is None  # no Slurm
    assert requeue(signal.SIGTERM, {"SLURM_JOB_ID": "7"}) is None  # sent by scancel, which must end the job
    assert requeue(usr1, {"SLURM_JOB_ID": "7; rm -rf /"}) is None
    assert len(scontrol.read_text().splitlines()) == 3


@pytest.mark.parametrize("resume", [["resume=auto"], pytest.param([], marks=pytest.mark.slow)])
def test_usr1_requeues_a_job_that_resumes(
    resume: list[str],
    scontrol: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Without resume=auto the requeued job would start from the beginning."""
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    command = [*SMALL, "method=greedy_ce", f"hydra.run.dir={tmp_path}/run", *resume]
    with monkeypatch.context() as patch:
        watched_by(patch, At("on_train_batch_start", send("SIGUSR1"), 1, 2))
        assert call(monkeypatch, "run", *command) == 128 + signal.SIGUSR1
    assert scontrol.exists() == bool(resume)
    if resume:
        assert capfd.readouterr().err.splitlines()[-1] == "Slurm job 5 was requeued"
        assert call(monkeypatch, "run", *command) == 0
        assert (tmp_path / "run" / "summary.json").exists()


def test_a_request_outside_the_main_thread_is_silent() -> None:
    """Python allows signal handlers only in the main thread; a run in another thread must not fail."""
    from concurrent.futures import ThreadPoolExecutor

    def listen() -> bool:
        with StopRequest().listening():
            return True

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(listen).result()


def test_a_signal_is_heeded_when_nobody_reads_standard_error() -> None:
    """The whole group is ended at once, the reader of a pipe first."""

    def heed() -> None:
        lose_reader(2)
        stop = StopRequest()
        with stop.listening():
            stop.waits = True
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop() == signal.SIGTERM

    assert child_exit(heed) == 0

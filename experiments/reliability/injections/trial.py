"""One fault: runs in their own folder, the checks on them, and the row with the outcome."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from experiments.reliability.forks import SMALL, differences, start, unreadable
from localfeat.run import train as training
from localfeat.run.command import main as run_main
from localfeat.run.folder import RunFolder
from localfeat.utils.files import write_whole

QUICK = [
    *SMALL,
    "method=greedy_ce",
    "split=k2",
    "epochs=2",
    "trainer.limit_train_batches=4",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "callbacks.checkpoint_every_n_batches=2",
]
"""Eight batches of the digits, with a checkpoint every two batches and every epoch."""

LAST_WORDS = ("error: ", "stopped by ")
LONGEST = 120.0  # seconds that a run may take


class UnexpectedError(Exception):
    """The outcome differs from the expected one; the message says how."""


class NotPossibleError(Exception):
    """This machine does not allow the fault; the message says why."""


@dataclass
class Row:
    """A row of the table. ``ok`` is None if the fault could not be made here."""

    fault: str
    expected: str
    seen: str
    ok: bool | None
    seconds: float


@dataclass
class Ended:
    """A process that has ended: its exit code, its output and its duration."""

    code: int
    output: str
    errors: str
    seconds: float

    @property
    def last_line(self) -> str:
        return ([""] + [line for line in self.errors.splitlines() if line.strip()])[-1]


def need(condition: object, otherwise: str) -> None:
    """Raise ``UnexpectedError(otherwise)`` unless ``condition`` holds."""
    if not condition:
        raise UnexpectedError(otherwise)


class Trial:
    """A folder for the runs of one fault.

    Attributes:
        place: folder that holds everything.
        folder: folder of the run that meets the fault.
        command: overrides of all its runs.
    """

    def __init__(self, place: Path, *more: str, base: list[str] = QUICK) -> None:
        self.place = place
        self.folder = place / "run"
        self.command = [*base, *more]
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)

    def begin(
        self,
        *more: str,
        prepare: Callable[[], object] = lambda: None,
        entry: Callable[[], None] = run_main,
        name: str = "log",
    ) -> Child:
        """Start a run with resume=auto in ``folder``; for another ``entry``, a command with the arguments ``more``."""
        for file in (self.place / name, self.place / f"{name}.err"):
            file.write_bytes(b"")
        own = [*self.command, "resume=auto", f"hydra.run.dir={self.folder}"] if entry is run_main else []

        def begin() -> None:
            os.setsid()  # a separate process group, as a shell makes for a command
            undisturbed()
            prepare()

        log, errors = self.place / name, self.place / f"{name}.err"
        options = [argument for argument in more if argument.startswith("-")]
        rest = [argument for argument in more if argument not in options]
        return Child(start([*options, *own, *rest], log, errors=errors, prepare=begin, entry=entry), log, errors)

    def run(self, *more: str, **how: Any) -> Ended:
        """Start a run and wait for its end."""
        return self.begin(*more, **how).end()

    def resume(self, *more: str, code: int = 0, but: str = "nothing", whole: Path | None = None) -> Ended:
        """Run the same command again and require the result of the uninterrupted run."""
        self.readable()
        ended = self.run(*more, name="again")
        need(ended.code == code, f"the same command again: exit code {ended.code}, {ended.last_line[:200]}")
        need("Traceback" not in ended.errors + ended.output, "the same command again: a stack trace")
        self.identical(but=but, whole=whole)
        return ended

    def identical(self, *, but: str = "nothing", whole: Path | None = None) -> None:
        """Require that the run has ended like the uninterrupted one."""
        need(RunFolder(self.folder).has_ended(), "no summary.json in the end")
        self.readable()
        found = list(differences(whole or self.whole(), self.folder, but=but))
        need(not found, f"not identical in the end: {'; '.join(found)}")

    def readable(self) -> None:
        """Require that no file in the run's folder is damaged."""
        found = list(unreadable(self.folder))
        need(not found, f"unreadable: {'; '.join(found)}")

    def whole(self) -> Path:
        """Return the folder of the uninterrupted run of the same command, made once per process."""
        key = tuple(self.command)
        if key not in _WHOLE:
            place = self.place.parent / f"whole_{os.getpid()}_{len(_WHOLE)}"
            shutil.rmtree(place, ignore_errors=True)
            log = place / "log"
            ended = Child(
                start([*self.command, f"hydra.run.dir={place}/run"], log, errors=log, prepare=undisturbed), log, log
            ).end()
            need(ended.code == 0, f"the uninterrupted run ended with {ended.code}: {log}")
            _WHOLE[key] = place / "run"
        return _WHOLE[key]

    def kill_midway(self) -> None:
        """Turn ``folder`` into a run killed in its second epoch: checkpoints after four and six batches, seven rows."""
        key = tuple(self.command)
        if key not in _CUT:
            ended = self.run(prepare=lambda: watch(At("on_train_batch_start", kill, 1, 4)))
            need(ended.code == -signal.SIGKILL, f"it was to be killed and ended with {ended.code}")
            _CUT[key] = self.place.parent / f"cut_{os.getpid()}_{len(_CUT)}"
            shutil.rmtree(_CUT[key], ignore_errors=True)
            shutil.move(self.folder, _CUT[key])
        shutil.copytree(_CUT[key], self.folder)


_WHOLE: dict[tuple[str, ...], Path] = {}
_CUT: dict[tuple[str, ...], Path] = {}


@dataclass
class Child:
    """A run's process, which leads its own process group."""

    number: int
    log: Path
    errors: Path

    def __post_init__(self) -> None:
        self.begun = time.perf_counter()

    def ended(self) -> bool:
        """Return whether the process has ended; ``end`` still has to collect it."""
        return os.waitid(os.P_PID, self.number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds."""
        while not condition():
            need(not self.ended(), f"it has ended too early: {self.errors.read_text()[-300:]}")
            need(time.perf_counter() - self.begun < LONGEST, f"nothing happened for {LONGEST:.0f} s")
            time.sleep(0.002)

    def end(self) -> Ended:
        """Wait for the process to end, but not forever."""
        since = time.perf_counter()
        while not self.ended():
            if time.perf_counter() - since > LONGEST:
                os.killpg(self.number, signal.SIGKILL)
                os.waitpid(self.number, 0)
                raise UnexpectedError(f"it hung for {LONGEST:.0f} s")
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        read = [file.read_text(errors="replace") for file in (self.log, self.errors)]
        return Ended(code, *read, time.perf_counter() - since)


def one_line(ended: Ended, code: int, *texts: str) -> str:
    """Require an exit code and one last line on stderr that contains ``texts``; return it."""
    need("Traceback" not in ended.errors + ended.output, f"a stack trace (exit code {ended.code})")
    need(ended.code == code, f"exit code {ended.code}, not {code}: {ended.last_line[:300]}")
    final = [line for line in ended.errors.splitlines() if line.startswith(LAST_WORDS)]
    need(len(final) == 1 and ended.last_line == final[0], f"no single last line, but {ended.errors[-400:]!r}")
    for text in texts:
        need(text in final[0], f"{text!r} is not in its last line: {final[0][:300]}")
    return final[0]


def succeeds(ended: Ended, *warnings: str) -> None:
    """Require exit code 0, no stack trace, and a line that starts with "warning: " for each of ``warnings``."""
    need("Traceback" not in ended.errors + ended.output, f"a stack trace (exit code {ended.code})")
    need(ended.code == 0, f"exit code {ended.code}, not 0: {ended.last_line[:300]}")
    said = [line for line in ended.errors.splitlines() if line.startswith("warning: ")]
    for text in warnings:
        need(any(text in line for line in said), f"no warning with {text!r}: {said}")


# --- within the run's process -----------------------------------------------------------------------------------------


class At(Callback):
    """Calls ``action()`` once when ``hook`` is called in epoch ``epoch`` with ``batches`` of its batches started."""

    def __init__(self, hook: str, action: Callable[[], object], epoch: int = 0, batches: int = 0) -> None:
        self.done = False

        def act(trainer: lightning.Trainer, *_: Any) -> None:
            ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            if not self.done and trainer.current_epoch == epoch and ready >= batches:
                self.done = True
                action()

        setattr(self, hook, act)


class Slow(Callback):
    """Waits in every batch."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(self.seconds)


def watch(*callbacks: Callback) -> None:
    """Give every run of this process these callbacks, before its own."""
    build = training.build_callbacks
    training.build_callbacks = lambda *a, **k: [*callbacks, *build(*a, **k)]  # type: ignore[assignment]


def kill() -> None:
    """Kill this process as if the machine had run out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def undisturbed() -> None:
    """Prepare the process: no login of this machine, and small pictures, as drawing takes longer than such a run."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "SLURM_", "HYDRA_"))]:
        del os.environ[name]
    os.environ["NETRC"] = os.devnull
    for name in ("learning_curves", "reconstruction_grid"):
        setattr(training, name, lambda *given, **_: write_whole(given[-1], b"a picture"))

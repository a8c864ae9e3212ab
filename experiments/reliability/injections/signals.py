"""A signal at any moment: the process ends soon, says how to resume, and the resumed run ends identical."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.reliability.forks import rows_of
from experiments.reliability.injections.images import image_overrides
from experiments.reliability.injections.trial import QUICK, At, Ended, Slow, Trial, need, one_line, watch
from localfeat.run import train as training
from tests.helpers.formats import write_image_folder

SOON = 10.0  # seconds
WANDB = ["logger=wandb", "logger.mode=offline"]


def at_random(name: str, *more: str, but: str = "nothing") -> Callable[[Path], str]:
    """Return a fault that signals the whole process group from outside, as a terminal does."""

    def make(place: Path) -> str:
        plain = Trial(place)
        if "dataset.num_workers=2" in more:
            plain = Trial(place, base=[*QUICK, *image_overrides(place / "data"), "dataset.num_workers=2"])
            write_image_folder(place / "data", {"train": 24, "test": 6}, size=(16, 16))
        logger = [override for override in more if override.startswith("logger")]
        return stop_and_resume(plain, name, logger, but)

    return make


def stop_and_resume(trial: Trial, name: str, more: list[str], but: str) -> str:
    """Send the signal in one of eight batches, then resume."""
    number, rows = getattr(signal, name), random.Random(f"{name} {trial.place.name}").randint(1, 6)

    def prepare() -> None:
        os.environ["HOME"] = str(trial.place)
        watch(Slow(0.1))

    child = trial.begin(*more, prepare=prepare)
    child.wait(lambda: rows_of(trial.folder / "metrics.csv") >= rows)
    os.killpg(child.number, number)
    ended = child.end()
    soon(ended, 128 + number, f"stopped by {name}; resume with: ")
    trial.resume(*more, but=but)
    return f"exit code {ended.code} {ended.seconds:.1f} s after a signal in batch {rows + 1} of 8; identical"


def soon(ended: Ended, code: int, *texts: str) -> None:
    """Require the process to end within ``SOON``."""
    one_line(ended, code, *texts)
    need(ended.seconds < SOON, f"{ended.seconds:.1f} s")


def send(name: str) -> Callable[[], None]:
    """Return a function that sends the signal to this process."""
    return lambda: os.kill(os.getpid(), getattr(signal, name))


def at(hook: str, epoch: int, where: str) -> Callable[[Path], str]:
    """Return a fault that sends SIGTERM at a hook."""

    def make(place: Path) -> str:
        trial = Trial(place)
        ended = trial.run(prepare=lambda: watch(At(hook, send("SIGTERM"), epoch)))
        one_line(ended, 143, "stopped by SIGTERM; resume with: ")
        trial.resume()
        return f"exit code 143, {where}; identical"

    return make


def before_training(place: Path) -> str:
    """Interrupt the run while the network is built."""
    trial = Trial(place)

    def prepare() -> None:
        build = training.build_learner

        def interrupted(*arguments: Any) -> Any:
            send("SIGTERM")()
            return build(*arguments)

        training.build_learner = interrupted

    one_line(trial.run(prepare=prepare), 143, "stopped by SIGTERM")
    need(not trial.folder.exists(), "a folder is left")
    trial.resume()
    return "exit code 143, no folder is left; identical"


def twice(place: Path) -> str:
    """Send a second signal while the first waits for the batch to end."""
    trial = Trial(place)

    def both() -> None:
        send("SIGINT")()
        send("SIGINT")()

    ended = trial.run(prepare=lambda: watch(At("on_train_batch_start", both, 1, 3)))
    need(ended.code == -signal.SIGINT, f"exit code {ended.code}")
    need("Traceback" not in ended.errors, "a stack trace")
    trial.resume()
    return "ends at once, by the signal itself; identical"


def under_slurm(place: Path) -> str:
    """Run with an scontrol that only records its arguments."""
    trial = Trial(place)
    program, notes = place / "bin" / "scontrol", place / "asked"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> "{notes}"\n')
    program.chmod(0o755)

    def prepare() -> None:
        os.environ.update(PATH=f"{program.parent}:{os.environ['PATH']}", SLURM_JOB_ID="5")
        watch(At("on_train_batch_start", send("SIGUSR1"), 1, 2))

    ended = trial.run(prepare=prepare)
    need(ended.code == 128 + signal.SIGUSR1, f"exit code {ended.code}")
    need(ended.last_line == "Slurm job 5 was requeued", f"says {ended.last_line}")
    need(notes.read_text() == "requeue 5\n", "scontrol was asked for something else")
    trial.resume()
    return "exit code 138, the job is in the queue again; identical"


STOP = "saves after the batch, ends within 10 s, 128 + signal; identical"
FAULTS = [
    *[(f"{name} at a random batch", STOP, at_random(name)) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")],
    ("SIGTERM with W&B logging offline", STOP, at_random("SIGTERM", *WANDB, but="wandb")),
    ("Ctrl-C with worker processes", STOP, at_random("SIGINT", "dataset.num_workers=2")),
    ("SIGTERM in validation", STOP, at("on_validation_batch_start", 1, "after the validation")),
    ("SIGTERM in the test", STOP, at("on_test_batch_start", 2, "without the test")),
    ("SIGTERM before training", "ends at once, leaves nothing", before_training),
    ("SIGINT twice", "ends at once; identical", twice),
    ("SIGUSR1 in a Slurm job", "saves, back into the queue; identical", under_slurm),
]

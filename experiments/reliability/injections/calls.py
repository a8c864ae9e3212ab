"""One system call of a run fails: the first of its kind, the second … until a run no longer reaches it."""

from __future__ import annotations

import errno
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.reliability.injections.trial import QUICK, Trial, need, one_line, succeeds
from localfeat.run.loggers import metrics_csv

SHORT = [*QUICK, "epochs=1", "trainer.limit_train_batches=3"]
DENSE, STRIDE = 12, 25
"""Writes are many: of those after the twelfth, every 25th fails."""

LEFT = ("checkpoints/previous.ckpt", ".lock")
"""Files that stay harmlessly if they cannot be removed."""


class Countdown:
    """Raises EIO at call ``number`` and leaves a file that says so; later calls work as usual."""

    def __init__(self, number: int, met: Path) -> None:
        self.left, self.met = number, met

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.met.touch()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``call`` so that it may fail."""

        def counted(*arguments: Any, **named: Any) -> Any:
            self()
            return call(*arguments, **named)

        return counted


def fail_writes(countdown: Countdown) -> None:
    """Let writes of whole files and of metrics.csv fail."""

    class Failing(io.FileIO):
        def write(self, content: Any) -> int:
            countdown()
            return super().write(content)

    opened = os.fdopen

    def fdopen(handle: int, mode: str = "r", *more: Any, **named: Any) -> Any:
        if mode != "wb":
            return opened(handle, mode, *more, **named)
        return io.BufferedWriter(Failing(handle, "wb"))

    os.fdopen = fdopen
    metrics_csv.open = lambda path, *_, **__: Failing(path, "r+b")  # type: ignore[attr-defined]


def fail(call: str, number: int, met: Path) -> None:
    """Let the ``number``-th ``call`` of this process fail."""
    countdown = Countdown(number, met)
    if call == "write":
        fail_writes(countdown)
    else:
        module: Any = tempfile if call == "mkstemp" else os
        setattr(module, call, countdown.before(getattr(module, call)))


def every(call: str) -> Callable[[Path], str]:
    """Return a fault that lets ``call`` fail at each point where a run calls it, one run per point."""

    def make(place: Path) -> str:
        number, stopped, unharmed = 1, 0, 0
        while (met := point(place, call, number)) is not None:
            stopped, unharmed = stopped + met, unharmed + (not met)
            number += STRIDE if call == "write" and number >= DENSE else 1
        need(stopped + unharmed, "no run has met it")
        stops = f"{stopped} end in one line with exit code 1 and go on identical" if stopped else ""
        goes = f"{unharmed} do no harm" if unharmed else ""
        return f"{stopped + unharmed} points: {', '.join(filter(None, [stops, goes]))}"

    return make


def point(place: Path, call: str, number: int) -> bool | None:
    """Return whether the run ends if this call fails; None if a run no longer reaches it."""
    trial, met = Trial(place / call, base=SHORT), place / f"{call}.met"
    met.unlink(missing_ok=True)
    ended = trial.run(prepare=lambda: fail(call, number, met))
    where = f"{call} {number}: "
    try:
        if ended.code == 0:
            succeeds(ended)
            for left in LEFT if call == "unlink" else ():
                (trial.folder / left).unlink(missing_ok=True)
            trial.identical()
        else:
            one_line(ended, 1, os.strerror(errno.EIO))
            trial.resume()
    except Exception as error:
        raise type(error)(where + str(error)) from error
    return ended.code != 0 if met.exists() else None


LINE = "one line, exit code 1; then identical"
FAULTS = [
    (f"I/O error: the first, second, … {name} of a run fails", LINE, every(call))
    for name, call in {
        "fsync": "fsync",
        "write (the first twelve, then every 25th)": "write",
        "rename": "replace",
        "temporary file": "mkstemp",
        "hard link": "link",
        "chmod": "chmod",
        "unlink": "unlink",
    }.items()
]

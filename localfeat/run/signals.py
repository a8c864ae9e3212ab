"""Signals that stop a run: it finishes the current batch, saves, and ends; a second signal ends it at once."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

from localfeat.utils.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
REQUEUE_SIGNAL = signal.SIGUSR1
"""The signal that Slurm sends before the time limit, with ``#SBATCH --signal=USR1@90``."""


def heed_signals() -> None:
    """Heed the signals that whoever started this process ignores, as a shell does for a command in the background."""
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


class StopRequest:
    """A request to stop, set by signals.

    Attributes:
        signum: the first signal received; None before that.
        waits: whether ``signum`` is read after every batch. If not (before and after training, when there is nothing to
            save), a signal raises ``Stopped`` at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.waits = False

    def __call__(self) -> int | None:
        return self.signum

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Handle any of ``SIGNALS``."""
        if self.signum is not None:  # a second signal acts as if it were not handled
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        self.signum = signum
        if not self.waits:
            raise Stopped(signum)
        # os.write, because the signal may have interrupted a print
        with suppress(OSError):  # whoever read standard error may have gone first
            os.write(2, f"\n{name(signum)}: saving after this batch; a second signal ends at once\n".encode())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals, except those that the parent process set to be ignored (nohup)."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can handle signals
            return
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self.install()
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def install(self) -> None:
        """Install the handlers, replacing any that a library has set meanwhile."""
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    signal.signal(signum, self.handle)


def name(signum: int) -> str:
    """Return a signal's name: SIGINT for 2."""
    return signal.Signals(signum).name


def requeue(signum: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """Requeue this job if Slurm runs it and the signal announced its time limit.

    Return a message for the user; None if there was nothing to do.
    """
    job = environment.get("SLURM_JOB_ID", "")
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    if signum != REQUEUE_SIGNAL or not re.fullmatch(r"\d+(_\d+)?", job):
        return None
    program = shutil.which("scontrol")
    if program is None:
        return f"Slurm job {job} was not requeued: scontrol is not installed here"
    try:
        subprocess.run([program, "requeue", job], capture_output=True, text=True, timeout=60, check=True)
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"Slurm job {job} was not requeued: {' '.join(str(said).split())}"
    return f"Slurm job {job} was requeued"

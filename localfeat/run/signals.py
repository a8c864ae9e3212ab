"""Signals that ask a run to stop: it finishes the batch under way, saves, and ends; a second one ends it at once."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from localfeat.utils.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
REQUEUE_SIGNAL = signal.SIGUSR1
"""What Slurm is told to send some time before the end: ``#SBATCH --signal=USR1@90``."""


class StopRequest:
    """What signals have asked for.

    Attributes:
        signum: the first signal that has come, None as long as there is none.
        waits: whether somebody looks at ``signum`` at the next batch. Otherwise a signal raises ``Stopped`` where
            the process is: before and after training, when there is nothing to save.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.waits = False

    def __call__(self) -> int | None:
        return self.signum

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The handler of all ``SIGNALS``."""
        if self.signum is not None:  # a second one: as if there were no handler
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        self.signum = signum
        if not self.waits:
            raise Stopped(signum)
        # os.write, as the signal may have come within a print
        os.write(2, f"\n{name(signum)}: saving after this batch; once more to end at once\n".encode())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals, but those that whoever began this process wants to be ignored (nohup)."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python hands signals to the main thread only
            return
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self.install()
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def install(self) -> None:
        """Take the signals over, also from a library that has put its own handlers there meanwhile."""
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    signal.signal(signum, self.handle)


def name(signum: int) -> str:
    """SIGINT for 2."""
    return signal.Signals(signum).name


def requeue(signum: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """Put this job into Slurm's queue again, if it is one and the signal was the one that announces its end.

    Returns what came of it, for the user; None if there was nothing to do.
    """
    job = environment.get("SLURM_JOB_ID", "")
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    if signum != REQUEUE_SIGNAL or not re.fullmatch(r"\d+(_\d+)?", job):
        return None
    program = shutil.which("scontrol")
    if program is None:
        return f"Slurm job {job} was not put into the queue again: there is no scontrol here"
    try:
        subprocess.run([program, "requeue", job], capture_output=True, text=True, timeout=60, check=True)
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"Slurm job {job} was not put into the queue again: {' '.join(str(said).split())}"
    return f"Slurm job {job} is in the queue again"

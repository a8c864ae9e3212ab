"""A job of a study in a process of its own, and what happens to it as lines of a file."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from localfeat.studies.sweep.folder import StudyFolder
from localfeat.studies.sweep.study import Job
from localfeat.utils.text import quoted

PROGRAM = (sys.executable, "-m", "localfeat.run")


@dataclass(frozen=True)
class RunJob:
    """What Hydra's launchers call for every job, here, in another process or on another machine.

    Each job is ``python -m localfeat.run`` in a fresh process, so that nothing is left over from the job before, and
    neither a crash nor a kill for lack of memory ends the sweep.

    Args:
        jobs: of which ``cfg.index`` names one.
        folder: of the study.
        sweep: identifies this sweep among those that work in the folder.
        cwd: where the jobs are run, for relative paths in their overrides.
        pid: of the sweep.
        program: that runs a job.
    """

    jobs: tuple[Job, ...]
    folder: StudyFolder
    sweep: str
    cwd: str = field(default_factory=os.getcwd)
    pid: int = field(default_factory=os.getpid)
    program: tuple[str, ...] = field(default_factory=lambda: PROGRAM)

    @property
    def events(self) -> Path:
        """One line of JSON for everything that happens, in order."""
        return self.folder.logs / f".events-{self.sweep}.jsonl"

    @property
    def stop(self) -> Path:
        """While this file exists no further job begins."""
        return self.folder.logs / f".stop-{self.sweep}"

    def __call__(self, cfg: DictConfig) -> str:
        """Run the job if it is still to be run; how it ended: done, failed, stopped, running (elsewhere)."""
        if os.getpid() != self.pid and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C goes to all; the sweep itself passes it on
        job = self.jobs[cfg.index]
        if self.stop.exists():
            return "stopped"
        with _signals_later():  # or nobody would know of the child
            lock = self.folder.lock(job.name)
            if lock is None:
                return self._end(job, "running")
            try:
                left = self.folder.left(job.name)
                if left == "finished":
                    return self._end(job, "done")
                begun = time.time()
                process = self._start(job, lock, resume=left == "unfinished")
                self._note(job, event="begin", pid=process.pid, host=socket.gethostname())
            finally:
                os.close(lock)  # from here on the child alone holds it
        if self.stop.exists():  # the sweep was told to stop before it could know of this process
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        finished = code == 0 and self.folder.left(job.name) == "finished"
        outcome = "done" if finished else "stopped" if self.stop.exists() else "failed"
        return self._end(job, outcome, code=code, seconds=time.time() - begun)

    def _start(self, job: Job, lock: int, *, resume: bool) -> subprocess.Popen[bytes]:
        folder = quoted(str(self.folder.run(job.name)))
        arguments = [f"resume={folder}"] if resume else [*job.overrides, f"hydra.run.dir={folder}"]
        with self.folder.log(job.name).open("ab") as log:
            return subprocess.Popen(
                [*self.program, *arguments],
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                start_new_session=True,  # a signal comes once, from the sweep, and not from the terminal too
            )

    def _end(self, job: Job, outcome: str, **more: Any) -> str:
        self._note(job, event="end", outcome=outcome, **more)
        return outcome

    def _note(self, job: Job, **content: Any) -> None:
        line = json.dumps({"job": job.name, "time": time.time(), **content}) + "\n"
        descriptor = os.open(self.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())  # one call: whole lines, whoever else writes
        finally:
            os.close(descriptor)


@contextmanager
def _signals_later() -> Iterator[None]:
    """Ctrl-C and SIGTERM to the main thread take effect after this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = {n: signal.signal(n, lambda number, _: caught.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
        for number in caught:
            signal.raise_signal(number)

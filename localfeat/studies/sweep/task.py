"""Run a job of a study in its own process, and record its events in a file."""

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
    """The function that Hydra's launchers call for every job, here, in another process or on another machine.

    Each job is ``python -m localfeat.run`` in a fresh process, so that no state is left over from the previous job, and
    neither a crash nor running out of memory ends the sweep.

    Args:
        jobs: the jobs that ``cfg.index`` chooses from.
        folder: the study's folder.
        sweep: the id of this sweep among those that work in the folder.
        cwd: the jobs' working directory, for relative paths in their overrides.
        pid: the sweep's process id.
        program: the command that runs a job.
    """

    jobs: tuple[Job, ...]
    folder: StudyFolder
    sweep: str
    cwd: str = field(default_factory=os.getcwd)
    pid: int = field(default_factory=os.getpid)
    program: tuple[str, ...] = field(default_factory=lambda: PROGRAM)

    @property
    def events(self) -> Path:
        """The file with one line of JSON per event, in order."""
        return self.folder.logs / f".events-{self.sweep}.jsonl"

    @property
    def stop(self) -> Path:
        """The file that keeps further jobs from starting while it exists."""
        return self.folder.logs / f".stop-{self.sweep}"

    def __call__(self, cfg: DictConfig) -> str:
        """Run the job unless it is finished; return its outcome: done, failed, stopped, running (elsewhere)."""
        if os.getpid() != self.pid and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches all processes; only the sweep handles it
        job = self.jobs[cfg.index]
        if self.stop.exists():
            return "stopped"
        with _signals_later():  # or a signal could leave a child that the sweep does not know of
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
                os.close(lock)  # from here on only the child holds it
        if self.stop.exists():  # the sweep was stopped before it knew of this process
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
                start_new_session=True,  # so that only the sweep sends signals, not the terminal, too
            )

    def _end(self, job: Job, outcome: str, **more: Any) -> str:
        self._note(job, event="end", outcome=outcome, **more)
        return outcome

    def _note(self, job: Job, **content: Any) -> None:
        line = json.dumps({"job": job.name, "time": time.time(), **content}) + "\n"
        descriptor = os.open(self.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())  # one call, so that lines of several writers do not mix
        finally:
            os.close(descriptor)


@contextmanager
def _signals_later() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM to the main thread until the context ends."""
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

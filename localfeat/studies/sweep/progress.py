"""Report a sweep's progress, and end its jobs on a signal."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from localfeat.studies.sweep.task import RunJob
from localfeat.utils.errors import Stopped

POLL = 0.1  # seconds


class Progress:
    """Follows the events of a sweep, prints a line for each, and keeps its jobs' outcomes.

    Args:
        task: the task whose events are followed.
        total: the number of jobs.
        finished: the number of jobs finished before this sweep.
        seconds: the training times of those jobs.
    """

    def __init__(self, task: RunJob, total: int, finished: int, seconds: list[float]) -> None:
        self.task, self.total, self.finished, self.seconds = task, total, finished, list(seconds)
        self.running: dict[str, dict[str, Any]] = {}
        self.ended: dict[str, str] = {}
        self._width = 1
        self._read = 0
        self._reading = threading.RLock()

    @contextmanager
    def following(self) -> Iterator[None]:
        """Print events as they happen."""
        over = threading.Event()

        def follow() -> None:
            while not over.wait(POLL):
                self.update()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.update()

    def update(self) -> None:
        """Process new events."""
        with self._reading:
            for event in self._new():
                getattr(self, f"_{event['event']}")(event)

    def of(self, *outcomes: str) -> list[str]:
        """Return the jobs with these outcomes, in the order in which they ended."""
        return [job for job, outcome in self.ended.items() if outcome in outcomes]

    def _new(self) -> list[dict[str, Any]]:
        if not self.task.events.exists():
            return []
        with self.task.events.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _begin(self, event: dict[str, Any]) -> None:
        self.running[event["job"]] = event
        self._width = max(self._width, len(self.running))
        self._say(event["job"], "begins")

    def _end(self, event: dict[str, Any]) -> None:
        job, outcome = event["job"], event["outcome"]
        self.running.pop(job, None)
        self.ended[job] = outcome
        if outcome == "done" and "seconds" in event:
            self.seconds.append(event["seconds"])
        self._say(job, _ending(event, self.task.folder.log(job)))

    def _say(self, job: str, what: str) -> None:
        done, failed = self.finished + len(self.of("done")), len(self.of("failed"))
        left = self.total - done - failed - len(self.running) - len(self.of("stopped", "running"))
        line = f"{job} {what} | {done} done, {failed} failed, {len(self.running)} running, {left} left"
        if self.seconds and left + len(self.running):
            rest = statistics.fmean(self.seconds) * (left + len(self.running)) / self._width
            line += f", about {duration(rest)}"
        print(line, flush=True)


def _ending(event: dict[str, Any], log: Path) -> str:
    outcome, code = event["outcome"], event.get("code")
    if outcome == "running":
        return "is running in another process"
    if "seconds" not in event:
        return "was finished by another sweep"
    took = f"in {duration(event['seconds'])}"
    if outcome != "failed":
        return f"{outcome} {took}"
    return f"FAILED {took} ({_reason(code)}{_last_error(log)}): {log}"


def _last_error(log: Path) -> str:
    """Return the job's error line, if that is the last line of its log."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return f", {lines[-1]}" if lines and lines[-1].startswith("error: ") else ""


def _reason(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "killed, possibly out of memory"
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds, like 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


@contextmanager
def ending_jobs_on_signals(progress: Progress) -> Iterator[None]:
    """On Ctrl-C or SIGTERM, start no further jobs, pass the signal to those on this machine, and wait for them.

    Raises:
        Stopped: these jobs have ended, or a second signal came.
    """
    caught: list[int] = []

    def stop(signum: int, _: object) -> None:
        caught.append(signum)
        if len(caught) == 1:
            progress.task.stop.touch()
            _end_children(progress, signum)
        raise Stopped(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_children(progress: Progress, signum: int) -> None:
    progress.update()
    here = {job: event for job, event in progress.running.items() if event["host"] == socket.gethostname()}
    print(f"ending {len(here)} running jobs (a second signal leaves at once)", flush=True)
    for event in here.values():
        try:
            os.kill(event["pid"], signum)
        except ProcessLookupError:
            continue
    while any(progress.task.folder.is_locked(job) for job in here):
        time.sleep(POLL)

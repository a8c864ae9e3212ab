"""A study's folder: a folder for every job, the jobs' logs and locks, and ``study.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from localfeat.run.folder import RunFolder
from localfeat.run.neutral import OF_OWN_IMAGES, is_neutral
from localfeat.studies.sweep.study import Job, Study, read_grid
from localfeat.utils.errors import UserError
from localfeat.utils.files import write_whole
from localfeat.utils.locks import is_locked, try_lock

State = Literal["new", "unfinished", "finished", "running"]


class StudyFolder:
    """The folder of a study: its runs in ``<path>/<job>/``, their output in ``<path>/logs/<job>.log``.

    Args:
        path: the folder's path, which need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.logs = self.path / "logs"

    def run(self, name: str) -> Path:
        """Return the folder of a job's run."""
        return self.path / name

    def log(self, name: str) -> Path:
        """Return the file with the output of all attempts of a job."""
        return self.logs / f"{name}.log"

    def state(self, name: str) -> State:
        """Return a job's state; a locked job is running, whatever its folder holds."""
        return "running" if self.is_locked(name) else self.left(name)

    def left(self, name: str) -> Literal["new", "unfinished", "finished"]:
        """Return a job's state by its files: a summary, a checkpoint to resume from, or neither."""
        run = RunFolder(self.run(name))
        if run.has_ended():
            return "finished"
        return "unfinished" if run.resumable() else "new"

    def lock(self, name: str) -> int | None:
        """Lock a job and return the open file descriptor that holds the lock; None if another process has it.

        A child process that inherits the descriptor holds the lock too, even after its parent has died.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        return try_lock(self.logs / f"{name}.lock")

    def is_locked(self, name: str) -> bool:
        """Return whether a process is training this job."""
        return is_locked(self.logs / f"{name}.lock")

    def check(self, jobs: Iterable[Job]) -> None:
        """Refuse jobs whose folders hold another run.

        Raises:
            UserError: a folder's run has other or unknown overrides, or a damaged summary.
        """
        for job in jobs:
            folder = self.run(job.name)
            if self.left(job.name) == "finished":
                self.summary(job.name)
            if self.left(job.name) != "new" and (found := _difference(_recorded(folder), job.overrides)):
                raise UserError(
                    f"{folder} holds a run of another configuration ({found}); "
                    "give the study another folder=<folder>, or move this one away"
                )

    def seconds(self, names: Iterable[str]) -> list[float]:
        """Return the training times of finished jobs."""
        found = [self.summary(name).get("seconds") for name in names]
        return [seconds for seconds in found if seconds is not None]

    def summary(self, name: str) -> dict[str, Any]:
        """Return the content of a finished job's summary.json.

        Raises:
            UserError: the file is damaged.
        """
        try:
            return RunFolder(self.run(name)).read_summary()
        except UserError as error:
            raise UserError(f"{error}; remove it to run the job again") from error

    def write_study(self, study: Study, jobs: Sequence[Job]) -> None:
        """Write ``study.json``; jobs of earlier sweeps are kept if they have a run.

        Raises:
            UserError: the folder cannot be written to.
        """
        now = [job.to_dict() for job in jobs]
        names = {job.name for job in jobs}
        earlier = [job for job in self._noted() if job["name"] not in names and self.run(job["name"]).is_dir()]
        content = {"name": study.name, "question": study.question, "jobs": [*now, *earlier]}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / "study.json", text.encode())
        except OSError as error:
            raise UserError(f"folder={self.path} cannot be written to ({error.strerror})") from error

    def _noted(self) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = json.loads((self.path / "study.json").read_text())["jobs"]
            return [job for job in found if isinstance(job["name"], str)]
        except (OSError, ValueError, KeyError, TypeError):  # missing, or not written by a sweep
            return []


def _recorded(folder: Path) -> list[str] | None:
    """Return the overrides of the run in ``folder``; None if they were not recorded."""
    run = RunFolder(folder)
    return run.read_overrides() if run.overrides.is_file() else None


def _difference(recorded: Sequence[str] | None, asked: Sequence[str]) -> str | None:
    """Describe the first difference that can change results."""
    if recorded is None:
        return "it has no .hydra/overrides.yaml"
    had, has = _values(recorded), _values(asked)
    for key in {**has, **had}:
        if had.get(key) != has.get(key):
            return f"{had.get(key) or f'no {key}'}, now {has.get(key) or f'no {key}'}"
    return None


def _values(overrides: Sequence[str]) -> dict[str, str]:
    grid = {key: values[0].lstrip("+") for key, values in read_grid(overrides).items()}
    own = OF_OWN_IMAGES if grid.get("dataset") == "dataset=image_folder" else ()
    return {key: value for key, value in grid.items() if key in own or not is_neutral(key)}

"""Finished runs and studies, read from their folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from localfeat.run.folder import RunFolder
from localfeat.run.loggers.metrics_csv import FILE_NAME, read_rows
from localfeat.studies.report.checks import complaint, is_inspection
from localfeat.utils.errors import UserError
from localfeat.utils.files import read_object

NOT_RUNS = {"wandb", "checkpoints", "inspection", "logs"}
TOLERANCE = 1e-6  # between summary.json and metrics.csv: one keeps float32 as text, the other as JSON


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run.

    Attributes:
        config: resolved, as config.yaml has it.
        summary: as summary.json has it.
    """

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def split(self) -> str:
        """What ``accuracy`` was measured on: ``test``, or ``validation`` for a run with ``test=false``."""
        return "validation" if self.summary["test_accuracy"] is None else "test"

    @property
    def accuracy(self) -> float:
        """Top-1, 0 to 1, on :attr:`split`, of the weights that were best on validation."""
        return float(self.summary["val_accuracy" if self.split == "validation" else "test_accuracy"])

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks per local module."""
        return tuple(self.summary["split"])

    @cached_property
    def validation(self) -> dict[int, float]:
        """Epochs done -> validation accuracy (0 to 1)."""
        rows = read_rows(self.folder / FILE_NAME)
        return {int(row["epoch"]) + 1: float(row["val/accuracy"]) for row in rows if row.get("val/accuracy")}

    @cached_property
    def inspection(self) -> dict[str, Any] | None:
        """What ``localfeat probe`` found in this run, if it was called; a damaged file counts as none."""
        try:
            return _inspection(self.folder)
        except UserError:  # which the report names
            return None


@dataclass(frozen=True)
class Study:
    """The plan that ``localfeat sweep`` wrote before its first job."""

    folder: Path
    name: str
    question: str
    jobs: tuple[str, ...]

    def missing(self) -> list[str]:
        """Jobs without a finished run, with how far they came."""
        return [f"{job} ({state})" for job in self.jobs if (state := _state(self.folder / job))]


@dataclass
class Material:
    """Everything below some folders.

    Attributes:
        unfinished: folders of runs without summary.json.
        left_out: one line for every folder that could not be used.
        given: the folders that all this lies below.
    """

    runs: list[Run] = field(default_factory=list)
    studies: list[Study] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    given: list[Path] = field(default_factory=list)

    def order(self) -> dict[Path, int]:
        """Where the studies have each run's folder."""
        folders = [(study.folder / job).resolve() for study in self.studies for job in study.jobs]
        return {folder: index for index, folder in reversed(list(enumerate(folders)))}

    def name_of(self, folder: Path) -> str:
        """``folder`` from the given one that it lies in, so that a report holds no path of the machine."""
        own = folder.resolve()
        tops = [top.resolve() for top in self.given if own.is_relative_to(top.resolve())]
        return own.relative_to(tops[0].parent).as_posix() if tops else folder.name

    def study_of(self, run: Run) -> Study | None:
        """Return the study that the run belongs to."""
        own = run.folder.resolve()
        return next((s for s in self.studies if any((s.folder / job).resolve() == own for job in s.jobs)), None)


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Every finished, undamaged run below ``folders``, each once, by path.

    Raises:
        UserError: a folder that does not exist, or no such run at all.
    """
    return read_material(folders).runs


def read_material(folders: Iterable[str | Path]) -> Material:
    """Every run and study below ``folders``; what cannot be used is named and left out.

    Raises:
        UserError: no finished run at all.
    """
    found, seen = Material(given=[Path(folder) for folder in folders]), set[Path]()
    for top in found.given:
        for folder, names in _folders(top):
            if folder.resolve() not in seen:
                seen.add(folder.resolve())
                _take(found, folder, names)
    if not found.runs:
        where = ", ".join(map(str, found.given)) or "no folder given"
        raise UserError("; ".join([f"{where}: no finished run (config.yaml and summary.json)", *found.left_out]))
    return found


def _folders(top: Path) -> Iterator[tuple[Path, set[str]]]:
    """Folders with what they hold, sorted; nothing below a run's folder is another run."""
    for path, below, files in os.walk(top):
        below[:] = sorted(name for name in below if not name.startswith(".") and name not in NOT_RUNS)
        if {"config.yaml", "summary.json"} & set(files):
            below.clear()
        yield Path(path), set(files)


def _take(found: Material, folder: Path, files: set[str]) -> None:
    try:
        if "study.json" in files:
            found.studies.append(_study(folder))
        if "summary.json" in files:
            found.runs.append(_run(folder))
            _inspection(folder)
        elif "config.yaml" in files:
            RunFolder(folder).read_config()
            found.unfinished.append(folder)
    except UserError as error:
        found.left_out.append(str(error))


def _study(folder: Path) -> Study:
    content = read_object(folder / "study.json")
    try:
        jobs = tuple(str(job["name"]) for job in content["jobs"])
        return Study(folder, str(content["name"]), str(content["question"]), jobs)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'study.json'} is not a study's: {error} is missing or of another kind") from error


def _run(folder: Path) -> Run:
    """The run in ``folder``, checked.

    Raises:
        UserError: files that are missing, damaged or not of one run.
    """
    summary = RunFolder(folder).read_summary()
    config = RunFolder(folder).read_config()
    if wrong := complaint(config, summary):
        raise UserError(f"{folder} is left out: {wrong}")
    run = Run(folder, config, {"test_accuracy": None, "val_accuracy": None, **summary})
    if run.summary["test_accuracy"] is None and run.summary["val_accuracy"] is None:
        raise UserError(f"{folder} is left out: it has neither a test nor a validation accuracy")
    _check_against_metrics(run)
    return run


def _inspection(folder: Path) -> dict[str, Any] | None:
    file = folder / "inspection" / "inspection.json"
    if not file.is_file():
        return None
    found = read_object(file)
    if not is_inspection(found):
        raise UserError(f"{file} is left out: it is not what localfeat probe writes")
    return found


def _check_against_metrics(run: Run) -> None:
    """The accuracies of the summary stand in metrics.csv too, or the two files are not of one run."""
    try:
        rows = read_rows(run.folder / FILE_NAME)
        logged = {name: _values(rows, f"{name}/accuracy") for name in ("val", "test")}
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{run.folder} is left out: {FILE_NAME} cannot be read ({error})") from error
    for name, values in logged.items():
        stated = run.summary[f"{name}_accuracy"]
        if stated is not None and not any(abs(value - stated) < TOLERANCE for value in values):
            raise UserError(f"{run.folder} is left out: {FILE_NAME} has no {name}/accuracy {stated}, summary.json does")


def _values(rows: Sequence[dict[str, str]], column: str) -> list[float]:
    return [float(row[column]) for row in rows if row.get(column)]


def _state(folder: Path) -> str:
    """Describe the progress of a job's run; empty if it has finished."""
    if (folder / "summary.json").is_file():
        return ""
    if RunFolder(folder).resumable():
        return "unfinished, has a checkpoint"
    return "unfinished, no checkpoint yet" if (folder / "config.yaml").is_file() else "not begun"

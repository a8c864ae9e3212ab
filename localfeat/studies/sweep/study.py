"""A study: a question and the jobs that answer it, read from ``experiments/<name>/study.yaml``."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localfeat.utils.errors import UserError

Grid = Mapping[str, Sequence[str]]
"""Key -> one override per value: {"seed": ["seed=0", "seed=1"]}."""

LONGEST_NAME = 200
"""Most bytes of a job's name, which names a folder and, with a suffix, files."""


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Attributes:
        name: the job's own overrides joined by commas; also the name of its folder.
        overrides: all overrides of the job, those of the study included.
    """

    name: str
    overrides: tuple[str, ...]

    @property
    def command(self) -> str:
        """The shell command that runs this job alone."""
        return shlex.join(["python", "-m", "localfeat.run", *self.overrides])

    def to_dict(self) -> dict[str, Any]:
        """Return the job's entry in ``study.json``."""
        return {"name": self.name, "overrides": list(self.overrides), "command": self.command}


@dataclass(frozen=True)
class Study:
    """The content of a study file.

    Attributes:
        name: the name of the file's folder.
        question: the question that the study answers.
        overrides: the overrides of every job.
        grids: one grid per line of jobs; each makes all its combinations.
    """

    name: str
    question: str
    overrides: tuple[str, ...]
    grids: tuple[Grid, ...]

    def jobs(self, typed: Sequence[str] = ()) -> list[Job]:
        """Return all jobs in the order of the file, without duplicates.

        Args:
            typed: further overrides. Values that occur in the lines of jobs only select among the jobs. Others apply
                to every job and win; several values for one key add a dimension to every grid.

        Raises:
            UserError: an unreadable override, no job left, or two different jobs with one name.
        """
        grids, fixed = self.grids, {key: values[0] for key, values in read_grid(self.overrides).items()}
        for key, values in read_grid(typed).items():
            known = {value for grid in self.grids for value in grid.get(key, ())}
            if known.issuperset(values):
                grids = _chosen(grids, key, values)
            elif len(values) > 1:
                grids = tuple({**grid, key: values} for grid in grids)
            else:
                grids = tuple({**grid, key: values} if key in grid else grid for grid in grids)
                fixed[key] = values[0]
        found = [_job(fixed, grid, combination) for grid in grids for combination in itertools.product(*grid.values())]
        return _distinct(found, self.name)


def _chosen(grids: Iterable[Grid], key: str, values: Sequence[str]) -> tuple[Grid, ...]:
    """Restrict grids that have this key to these values; keep the others unchanged."""
    cut = ({**grid, key: [v for v in grid[key] if v in values]} if key in grid else grid for grid in grids)
    return tuple(grid for grid in cut if grid.get(key, values))


def _job(fixed: Mapping[str, str], grid: Grid, combination: Sequence[str]) -> Job:
    others = [override for key, override in fixed.items() if key not in grid]
    name = ",".join(combination)
    if not name or "/" in name or len(name.encode()) > LONGEST_NAME:
        raise UserError(
            f"{name or 'a line of jobs without overrides'}: cannot be the name of a folder; keep such values "
            "out of the lines of jobs, in the study's overrides"
        )
    return Job(name, (*others, *combination))


def _distinct(jobs: Sequence[Job], study: str) -> list[Job]:
    found: dict[str, Job] = {}
    for job in jobs:
        if found.setdefault(job.name, job).overrides != job.overrides:
            raise UserError(f"study={study}: two different jobs are called {job.name}")
    if not found:
        raise UserError(f"study={study}: no job is left with these overrides")
    return list(found.values())


def read_grid(overrides: Iterable[str]) -> dict[str, list[str]]:
    """Return overrides in Hydra's syntax as key -> one override per value; the last of equal keys counts.

    Raises:
        UserError: not an override, a ``~key``, or a sweep over an interval.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, found = OverridesParser.create(), dict[str, list[str]]()
    for text in overrides:
        try:
            override = parser.parse_override(text)
            if override.is_delete() or (override.is_sweep_override() and not override.is_discrete_sweep()):
                raise UserError(f"{text}: a job needs a value")
            key = override.get_key_element()
            values = (
                list(dict.fromkeys(override.sweep_string_iterator()))
                if override.is_sweep_override()
                else [text.partition("=")[2]]
            )
        except HydraException as error:
            raise UserError(f"{text}: not key=value (several values are separated by commas)") from error
        found.pop(key.lstrip("+"), None)
        found[key.lstrip("+")] = [f"{key}={value}" for value in values]
    return found


def load_study(name: str) -> Study:
    """Return the study of a name (below ``experiments``) or of a file.

    Raises:
        UserError: the study does not exist or cannot be read.
    """
    file = study_file(name)
    content = _read(file)
    overrides = _texts(file, "overrides", content.get("overrides") or [])
    lines = _texts(file, "jobs", content.get("jobs") or [])
    question = content.get("question")
    if not isinstance(question, str) or not lines:
        raise UserError(
            f"{file}: a study has a question (text) and jobs (a list with a line of overrides for each grid)"
        )
    if varied := [key for key, values in read_grid(overrides).items() if len(values) > 1]:
        raise UserError(f"{file}: {varied[0]} has several values: move them to the lines of jobs")
    grids = tuple(read_grid(line.split()) for line in lines)
    return Study(file.resolve().parent.name, question.strip(), tuple(overrides), grids)


def study_file(name: str) -> Path:
    """Return a study's file: ``name`` itself, or below ``experiments`` (current folder, checkout, wheel)."""
    if name.endswith((".yaml", ".yml")):
        places = [Path(name)]
    else:
        package = Path(__file__).resolve().parents[2]
        folders = [place / "experiments" for place in (Path(), package.parent, package)]
        places = [folder / name / "study.yaml" for folder in folders]
    for place in places:
        if name and place.is_file():
            return place
    known = sorted({file.parent.name for place in places for file in place.parent.parent.glob("*/study.yaml")})
    raise UserError(f"study={name}: there is no {places[0]}" + (f"; there are {', '.join(known)}" if known else ""))


def _read(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # from YAML's reader, OmegaConf or the file system
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: a study has the keys question, overrides and jobs")
    if unknown := [str(key) for key in content if key not in ("question", "overrides", "jobs")]:
        raise UserError(f"{file}: {unknown[0]} is not a key of a study: question, overrides, jobs")
    return {str(key): value for key, value in content.items()}


def _texts(file: Path, key: str, value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{file}: {key} must be a list of strings, one for each line")
    return value

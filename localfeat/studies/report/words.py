"""The sentences of a report: one place for Markdown, LaTeX and HTML."""

from __future__ import annotations

import shlex

from localfeat.studies.report.provenance import Notes
from localfeat.studies.report.rows import Row, Table
from localfeat.studies.report.runs import Material, Run
from localfeat.studies.report.settings import Settings, below, shown_value

TOLD = ("backbone", "batch_size", "trainer.precision", "optimizer.lr", "optimizer.weight_decay", "dataset.augmentation")
EMPTY = (None, "{}")
LIMITS = ("trainer.max_steps", "trainer.limit_train_batches", "trainer.limit_val_batches", "trainer.limit_test_batches")


def title(material: Material) -> str:
    """The studies' names; without studies those of the folders."""
    names = [study.name for study in material.studies] or [folder.resolve().name for folder in material.given]
    return ", ".join(dict.fromkeys(names))


def questions(material: Material) -> list[str]:
    return list(dict.fromkeys(study.question for study in material.studies))


def counted(count: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def facts(table: Table, notes: Notes) -> list[tuple[str, str]]:
    """Name and text of what holds for a whole table, or for all rows of it without a footnote."""
    seeds = sorted({run.seed for run in table.runs})
    versions = [f"{name.removesuffix(' version')} {value}" for name, value in notes.usual.items() if "version" in name]
    which = "seed" if len(seeds) == 1 else "seeds"
    found = [
        ("Runs", f"{counted(len(table.runs), 'run')}, {which} {', '.join(map(str, seeds))}"),
        ("Settings of all rows", "; ".join(_told(table.common()))),
        ("Commit", notes.usual["commit"]),
        ("Hardware", notes.usual["hardware"]),
        ("Versions", ", ".join(versions)),
        ("Memory counted by", notes.usual["memory counted by"]),
    ]
    if limits := _limits(table.common()):
        found.insert(0, ("Not whole epochs or splits", ", ".join(limits)))
    if table.split == "validation":
        found.insert(0, ("Not test accuracy", VALIDATION))
    return found


VALIDATION = (
    "these runs left the test set alone (test=false); the accuracy is that of the best epoch on the validation split, "
    "which chose that epoch"
)


def _told(common: Settings) -> list[str]:
    kept = {key: value for key, value in common.items() if below(key, TOLD) and value not in EMPTY}
    return [f"{key}={shown_value(value)}" for key, value in kept.items()]


def _limits(common: Settings) -> list[str]:
    kept = {key: common[key] for key in LIMITS if common.get(key) not in (None, -1)}
    return [f"{key}={shown_value(value)}" for key, value in kept.items()]


def seeds(row: Row) -> str:
    """Return every run's seed and accuracy in per cent."""
    return ", ".join(f"seed {run.seed}: {100 * run.accuracy:.2f} %" for run in row.runs)


def command(run: Run) -> str:
    """What runs it again: its overrides, else the command line that it wrote down."""
    overrides = run.summary.get("overrides")
    if not overrides:
        return str(run.summary.get("command"))
    return shlex.join(["python", "-m", "localfeat.run", *overrides])


def missing(material: Material) -> list[str]:
    """Return one line for every job, run or folder that the report could not use."""
    found = [f"{study.name}: {job}" for study in material.studies for job in study.missing()]
    jobs = {(study.folder / job).resolve() for study in material.studies for job in study.jobs}
    found += [
        f"{material.name_of(folder)} (has not ended)" for folder in material.unfinished if folder.resolve() not in jobs
    ]
    return found + material.left_out


def progress(material: Material) -> str:
    """Return how many jobs of the studies have finished."""
    jobs = sum(len(study.jobs) for study in material.studies)
    lost = sum(len(study.missing()) for study in material.studies)
    done = f", {jobs - lost} of {counted(jobs, 'job')} finished" if jobs else ""
    return f"{counted(len(material.runs), 'run')}{done}"

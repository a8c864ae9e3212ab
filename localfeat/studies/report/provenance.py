"""Hardware and versions of a table's runs, and the rows that differ from the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import Any

from localfeat.studies.report.rows import Row, Table
from localfeat.studies.report.runs import Run


def provenance(run: Run) -> dict[str, str]:
    """In words: the commit, each version, the hardware, how memory was measured."""
    summary = run.summary
    versions = {f"{name} version": str(version) for name, version in summary["versions"].items()}
    return {
        "commit": commit(summary.get("commit")),
        **versions,
        "hardware": hardware(summary["hardware"]),
        "memory counted by": str(summary.get("peak_memory_source") or "not measured"),
    }


def commit(found: Mapping[str, Any] | None) -> str:
    """The commit, ten characters of it, and whether the files were changed since."""
    if not found:
        return "unknown"
    return str(found["id"])[:10] + (" with uncommitted changes" if found.get("dirty") else "")


def hardware(found: Mapping[str, Any]) -> str:
    """Return the GPU; without one, the CPU and its number of threads."""
    if found.get("gpu"):
        count = found.get("gpus", 1)
        return f"{count} × {found['gpu']}" if count != 1 else str(found["gpu"])
    threads = found.get("threads")
    return f"{found.get('cpu')}, {threads} thread{'' if threads == 1 else 's'}, no GPU"


@dataclass(frozen=True)
class Notes:
    """Footnotes of a table.

    Attributes:
        usual: what most runs have: "commit" -> the commit, and so on.
        texts: sign -> what it says.
        signs: row number -> its signs.
    """

    usual: dict[str, str]
    texts: dict[str, str] = field(default_factory=dict)
    signs: dict[int, str] = field(default_factory=dict)


def notes(table: Table) -> Notes:
    """Every way in which a row is not like most of the table, or not what its name says."""
    usual = majority(table)
    rows_of: dict[str, list[int]] = {}
    for row in table.rows:
        for text in [*_unlike(row, usual), *_seeds(row, table), *table.published(row).sources]:
            rows_of.setdefault(text, []).append(row.number)
    found = Notes(usual)
    for index, (text, numbers) in enumerate(rows_of.items()):
        sign = _sign(index)
        found.texts[sign] = text
        for number in numbers:
            found.signs[number] = ",".join(filter(None, [found.signs.get(number), sign]))
    return found


def _sign(index: int) -> str:
    """a, b, … z, aa, ab, …"""
    before, last = divmod(index, len(ascii_lowercase))
    return (ascii_lowercase[before - 1] if before else "") + ascii_lowercase[last]


def majority(table: Table) -> dict[str, str]:
    """Return the most common value of every field; ties go to the first."""
    counts: dict[str, Counter[str]] = {}
    for run in table.runs:
        for name, value in provenance(run).items():
            counts.setdefault(name, Counter())[value] += 1
    return {name: counter.most_common(1)[0][0] for name, counter in counts.items()}


def _unlike(row: Row, usual: Mapping[str, str]) -> list[str]:
    """Return one sentence for each field in which a run of the row differs from most of the table."""
    found = []
    own = [provenance(run) for run in row.runs]
    for name, most in usual.items():
        values = list(dict.fromkeys(values.get(name, "unknown") for values in own))
        if values != [most]:
            whose = "its seeds are mixed: " if len(values) > 1 else ""
            found.append(f"{name}: {whose}{' and '.join(values)}; most runs of the table: {most}")
    return found


def _seeds(row: Row, table: Table) -> list[str]:
    found = [_repeated(row, seed) for seed in row.repeated_seeds]
    other = table.baseline(row)
    if other is not None and set(other.accuracy_of_seed) != set(row.accuracy_of_seed):
        found.append(f"compared over other seeds: {_listed(row)} here, {_listed(other)} end to end")
    if other is not None and len(table.end_to_end) > 1:
        found.append(f"compared with row {other.number}, {other.label}")
    return found


def _repeated(row: Row, seed: int) -> str:
    runs = [run for run in row.runs if run.seed == seed]
    figures = ", ".join(f"{100 * run.accuracy:.2f}" for run in runs)
    return f"seed {seed} was run {len(runs)} times ({figures} %) and counts once, with their mean"


def _listed(row: Row) -> str:
    return ", ".join(map(str, row.accuracy_of_seed))

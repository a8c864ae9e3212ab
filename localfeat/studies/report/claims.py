"""Published claims of one method over another, beside our results for the same pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from localfeat.studies.report.cells import signed
from localfeat.studies.report.published import agrees, match_keys, published, source
from localfeat.studies.report.rows import Row, Table
from localfeat.studies.report.settings import below, varying

UNITS = {"accuracy": "points of accuracy", "memory_saved": "% of peak memory saved"}


def claims(table: Table) -> list[str]:
    """Return a sentence for each claim that two rows of ``table`` can test."""
    found = [(claim, sorted(_ours(claim, table))) for claim in published()["claims"]]
    return [_sentence(claim, ours) for claim, ours in found if ours]


def _ours(claim: dict[str, Any], table: Table) -> list[float]:
    """Return the claimed quantity for every pair of rows that differ only in the method."""
    if claim["quantity"] == "accuracy" and table.split != "test":
        return []
    keys = match_keys(claim["match"])
    own, other = (
        [r for r in table.rows if r.method == claim[k] and agrees(keys, r.settings)] for k in ("method", "over")
    )
    measure: Callable[[Row, Row], float | None] = _points if claim["quantity"] == "accuracy" else _saved
    pairs = [(a, b) for a in own for b in other if _alike(a, b)]
    return [value for a, b in pairs if (value := measure(a, b)) is not None]


def _alike(row: Row, other: Row) -> bool:
    named = ("method.name", "method.reconstruct")
    return all(below(key, named) for key in varying([row.settings, other.settings]))


def _points(row: Row, other: Row) -> float | None:
    return 100 * (row.mean - other.mean)


def _saved(row: Row, other: Row) -> float | None:
    if row.peak_memory_bytes is None or not other.peak_memory_bytes:
        return None
    return 100 * (1 - row.peak_memory_bytes / other.peak_memory_bytes)


def _sentence(claim: dict[str, Any], ours: list[float]) -> str:
    span = " to ".join(dict.fromkeys([signed(ours[0]), signed(ours[-1])]))
    pairs = "1 pair" if len(ours) == 1 else f"{len(ours)} pairs"
    return (
        f"{claim['method']} over {claim['over']}, {UNITS[claim['quantity']]}: here {span} ({pairs} of rows), "
        f"published: at most {signed(float(claim['at_most']))} ({source(claim['source'])})"
    )

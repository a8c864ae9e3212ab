"""Markdown tables and the figures in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GIB = 1024**3

Row = Mapping[str, Any]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def gib(size: float) -> str:
    """Bytes in units of 1024³."""
    return f"{size / GIB:.2f}"


def saving(row: Row, reference: Row) -> str:
    """How much less memory than the reference, in per cent; below zero: more."""
    return f"{round(saved(row, reference), 1) + 0.0:.1f} %"  # + 0.0: no minus before zero


def saved(row: Row, reference: Row) -> float:
    """As :func:`saving`, a number."""
    return 100.0 * (1 - row["peak_bytes"] / reference["peak_bytes"])


def ratio(row: Row, reference: Row, figure: str = "flops") -> str:
    """One figure relative to the reference's."""
    return f"{row[figure] / reference[figure]:.2f}"


def cuts(row: Row) -> str:
    """Numbers of the blocks after which the network is cut; long runs of them shortened."""
    values = row["cuts"]
    if not values:
        return "–"
    if len(values) > 4 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}, {values[1]}, … {values[-1]}"
    return ", ".join(map(str, values))


def settings(row: Row) -> str:
    """Efficiency and accumulation in words."""
    parts = f", in {row['accumulate']} accumulated parts" if row["accumulate"] > 1 else ""
    return f"{row['efficiency_name']}{parts}"


def find(rows: Sequence[Row], **wanted: Any) -> Row:
    """The first row with these values.

    Raises:
        LookupError: there is none.
    """
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()):
            return row
    raise LookupError(f"no row with {wanted}")

"""Markdown tables and the formatting of their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GIB = 1024**3

Row = Mapping[str, Any]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def gib(size: float) -> str:
    """Format bytes in GiB, units of 1024³."""
    return f"{size / GIB:.2f}"


def saving(row: Row, reference: Row) -> str:
    """Format how much less memory than the reference a row takes, in per cent; negative means more."""
    return f"{round(saved(row, reference), 1) + 0.0:.1f} %"  # + 0.0: no minus before zero


def saved(row: Row, reference: Row) -> float:
    """Return :func:`saving` as a number."""
    return 100.0 * (1 - row["peak_bytes"] / reference["peak_bytes"])


def ratio(row: Row, reference: Row, figure: str = "flops") -> str:
    """Format one figure relative to the reference's."""
    return f"{row[figure] / reference[figure]:.2f}"


def cuts(row: Row) -> str:
    """Format the numbers of the blocks after which the network is cut; long runs are shortened."""
    values = row["cuts"]
    if not values:
        return "–"
    if len(values) > 4 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}, {values[1]}, … {values[-1]}"
    return ", ".join(map(str, values))


def settings(row: Row) -> str:
    """Describe efficiency and accumulation in words."""
    parts = f", in {row['accumulate']} accumulated parts" if row["accumulate"] > 1 else ""
    return f"{row['efficiency_name']}{parts}"


def find(rows: Sequence[Row], **wanted: Any) -> Row:
    """Return the first row with these values.

    Raises:
        LookupError: no row has them.
    """
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()):
            return row
    raise LookupError(f"no row with {wanted}")

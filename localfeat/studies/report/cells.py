"""The columns of a table and how a figure is written: one place for Markdown, LaTeX and HTML."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from localfeat.studies.report.provenance import Notes
from localfeat.studies.report.rows import Row, Table

GIB = 2**30
NOTHING = "–"
Tone = Literal["", "better", "worse"]


@dataclass(frozen=True)
class Cell:
    """A figure as printed.

    Attributes:
        text: a minus is U+2212; ``–`` stands for a figure that there is none of.
        signs: of footnotes.
        best: of the column.
        tone: whether it speaks for or against the row.
        share: of the column's greatest figure, for a bar that starts at nought.
    """

    text: str
    signs: str = ""
    best: bool = False
    tone: Tone = ""
    share: float | None = None


@dataclass(frozen=True)
class Column:
    """One column; ``hint`` says in a sentence what its figures are."""

    heading: str
    hint: str
    cell: Callable[[Table, Row, Notes], Cell]
    numeric: bool = True


def columns(table: Table) -> list[Column]:
    """Return the columns that apply to this table: without end-to-end rows, no comparison with them."""
    compared, found = bool(table.end_to_end) and len(table.rows) > len(table.end_to_end), list(FIRST)
    found += [VERSUS] if compared else []
    found += [AT_EQUAL_FLOPS] if any(table.at_equal_flops(row) is not None for row in table.rows) else []
    found += [MEMORY, *([SAVED] if compared else [])]
    found += [FLOPS] if any(row.flops is not None for row in table.rows) else []
    found += LAST
    published = [table.published(row) for row in table.rows]
    if any(figures.accuracy is not None for figures in published):
        found += [PAPER, TO_PAPER]
    if any(figures.memory_saved is not None or figures.memory_mb is not None for figures in published):
        found += [PAPER_MEMORY]
    return found


def _accuracy(table: Table, row: Row, notes: Notes) -> Cell:
    best = len(table.rows) > 1 and _percent(row.mean) == max((_percent(r.mean) for r in table.rows), key=float)
    count = len(row.accuracy_of_seed)
    spread = "" if row.std is None else f" ± {_percent(row.std)} ({count})"
    return Cell(f"{_percent(row.mean)}{spread}", best=best)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _points(value: float | None, *, clear: bool = False) -> Cell:
    """A difference in points; coloured only if it is ``clear``, so that noise does not look like a result."""
    if value is None:
        return Cell(NOTHING)
    return Cell(signed(value), tone=_tone(signed(value)) if clear else "")


def _clear(row: Row, other: Row | None) -> bool:
    """Tell whether two means differ by more than two standard errors; never with a single seed."""
    if other is None or row.std is None or other.std is None:
        return False
    error = math.sqrt(row.std**2 / len(row.accuracy_of_seed) + other.std**2 / len(other.accuracy_of_seed))
    return abs(row.mean - other.mean) > 2 * error


def signed(value: float) -> str:
    """Two decimals with a sign; nought has none."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def _tone(text: str) -> Tone:
    return "worse" if text.startswith("−") else "better" if text.startswith("+") else ""


def _memory(table: Table, row: Row, notes: Notes) -> Cell:
    if row.peak_memory_bytes is None:
        return Cell(NOTHING)
    known = [other.peak_memory_bytes for other in table.rows if other.peak_memory_bytes is not None]
    least = len(known) > 1 and gib(row.peak_memory_bytes) == gib(min(known))
    return Cell(gib(row.peak_memory_bytes), best=least, share=row.peak_memory_bytes / max(known))


def gib(size: float) -> str:
    """Two decimals, below 1 three significant digits: 13.14, 0.0713."""
    value = size / GIB
    if value >= 1:
        return f"{value:.2f}"
    return f"{value:#.3g}" if value >= 1e-4 else f"{value:.6f}"


def _saved(table: Table, row: Row, notes: Notes) -> Cell:
    share = table.memory_saved(row)
    if share is None:
        return Cell(NOTHING)
    text = f"{100 * share:.1f}"
    text = "0.0" if float(text) == 0 else text.replace("-", "−")
    return Cell(f"{text} %", tone="" if text == "0.0" else "worse" if share < 0 else "better")


def _flops(table: Table, row: Row, notes: Notes) -> Cell:
    if row.flops is None:
        return Cell(NOTHING)
    ratio = table.relative_flops(row)
    return Cell(f"{row.flops / 1e9:.3g} G" if ratio is None else f"{ratio:.2f} ×")


def _speed(table: Table, row: Row, notes: Notes) -> Cell:
    value = row.images_per_second
    return Cell(NOTHING if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2f}")


def parameters(count: int) -> str:
    """Millions or thousands with two decimals, below a thousand the number."""
    if count >= 10**6:
        return f"{count / 10**6:.2f} M"
    return f"{count / 10**3:.2f} k" if count >= 10**3 else str(count)


def _parameters(table: Table, row: Row, notes: Notes) -> Cell:
    counts = row.parameters
    auxiliary = f" + {parameters(counts['auxiliary'])}" if counts["auxiliary"] else ""
    return Cell(parameters(counts["backbone"]) + auxiliary)


def _epochs(table: Table, row: Row, notes: Notes) -> Cell:
    return Cell("–".join(map(str, [row.epochs[0], row.epochs[-1]][: len(row.epochs)])))


def _paper(table: Table, row: Row, notes: Notes) -> Cell:
    figure = table.published(row).accuracy
    return Cell(NOTHING if figure is None else f"{figure:.2f}")


def _paper_memory(table: Table, row: Row, notes: Notes) -> Cell:
    figures = table.published(row)
    if figures.memory_saved is not None:
        return Cell(f"{figures.memory_saved:g} %")
    return Cell(NOTHING if figures.memory_mb is None else f"{figures.memory_mb:,.0f} MB")


FIRST = (
    Column("#", "row, as the plots number it", lambda table, row, notes: Cell(str(row.number))),
    Column(
        "method and settings",
        "the method, and every setting in which it differs from another row or from its own defaults",
        lambda table, row, notes: Cell(row.label, signs=notes.signs.get(row.number, "")),
        numeric=False,
    ),
    Column("K", "local modules", lambda table, row, notes: Cell(str(row.modules))),
    Column("accuracy %", "top-1, mean ± sample standard deviation (number of seeds)", _accuracy),
)
VERSUS = Column(
    "vs e2e, points",
    "accuracy less that of end-to-end training in the table; coloured beyond two standard errors of the difference",
    lambda table, row, notes: _points(table.to_baseline(row), clear=_clear(row, table.baseline(row))),
)
AT_EQUAL_FLOPS = Column(
    "at equal FLOPs, points",
    "accuracy less that of end-to-end training for as many FLOPs, interpolated between its numbers of epochs",
    lambda table, row, notes: _points(table.at_equal_flops(row)),
)
MEMORY = Column("memory GiB", "peak of a training step, the most that any seed needed; 1 GiB is 2^30 bytes", _memory)
SAVED = Column("under e2e", "peak memory saved against end-to-end training in the same table", _saved)
FLOPS = Column(
    "FLOPs",
    "of training an image, forward and backward, by accounting: relative to end-to-end training, or in GFLOPs without",
    _flops,
)
LAST = (
    Column("images/s", "median over epochs, then over seeds; training steps alone", _speed),
    Column("parameters", "backbone + auxiliary parts, which are needed in training only", _parameters),
    Column("epochs", "epochs trained", _epochs),
)
PAPER = Column("published %", "accuracy published for this setting; the footnote says where", _paper)
TO_PAPER = Column(
    "vs published, points",
    "our accuracy less the published one",
    lambda table, row, notes: _points(table.to_published(row)),
)
PAPER_MEMORY = Column("published memory", "memory saved against end to end, or needed, as published", _paper_memory)

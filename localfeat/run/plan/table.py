"""The planner's result, as a table and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from localfeat.memory.emulation import Target
from localfeat.memory.planner import Option

MIB, GIB = 2**20, 2**30
WIDTH_OF_A_PIPE = 1000  # columns: lines stay whole in files and pipes


@dataclass(frozen=True)
class Plan:
    """A request and its result.

    Attributes:
        budget: the budget in bytes, without the margin.
        options: all options evaluated.
        recommended: the cheapest option that fits at the requested batch size, of the configuration's method and
            end-to-end training; else the one with the largest batch; ``None`` if nothing fits at any batch size.
        command: the command that runs the recommended option.
        confirmed_bytes: the peak of a whole step of that option, on the meta device.
    """

    batch_size: int
    precision: str
    device: Target
    backbone: str
    budget: int
    options: list[Option]
    recommended: Option | None
    command: str | None
    confirmed_bytes: int | None

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(asdict(self), indent=2)

    def nothing_fits(self) -> str:
        """Return one line for a plan without a recommendation."""
        least = min(self.options, key=lambda option: option.peak_bytes)
        return (
            f"nothing fits into {_size(self.budget)} at any batch size; the least at batch_size="
            f"{self.batch_size} is {_size(least.peak_bytes)} (method={least.method}, K={least.modules}, "
            f"efficiency={least.efficiency})"
        )

    def show(self, *, everything: bool = False) -> None:
        """Print the table and the recommended command."""
        console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_PIPE)
        shown = self.options if everything else _most_useful(self.options)
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in ("method", "efficiency", "K", "cuts"):
            table.add_column(name, no_wrap=True)
        for name in (f"peak at {self.batch_size}", "fits", "most", "cost"):
            table.add_column(name, justify="right", no_wrap=True)
        for option in shown:
            table.add_row(*_cells(option), style=None if option.fits else "dim")
        console.print(f"{self.backbone}, {self.precision} on {self.device}, {_size(self.budget)} without the margin")
        console.print(table)
        console.print("most: largest batch that fits; cost: estimated time of a step, plain e2e is 1")
        if self.command and self.recommended and self.confirmed_bytes is not None:
            if self.recommended.largest_batch < self.batch_size:
                console.print(f"nothing fits with batches of {self.batch_size}: use smaller ones, accumulated")
            console.print(f"recommended ({_size(self.confirmed_bytes)}):")
            console.print(f"  {self.command}", soft_wrap=True)


def _size(size: float) -> str:
    if size < MIB:
        return f"{size / 2**10:.1f} KiB"
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def _cells(option: Option) -> list[str]:
    return [
        option.method,
        _efficiency_text(option),
        str(option.modules),
        "balanced" if option.balanced and option.cuts else ",".join(map(str, option.cuts)),
        _size(option.peak_bytes),
        "yes" if option.fits else "no",
        str(option.largest_batch) if option.largest_batch else "–",
        f"{option.step_cost:.2f}",
    ]


def _efficiency_text(option: Option) -> str:
    """Return the setting's name; for a search's result, the number of blocks it recomputes."""
    blocks = option.settings.blocks
    if blocks is None and not _changed(option):
        return option.efficiency
    count = len(blocks or ())
    return f"{count} block{'' if count == 1 else 's'} recomputed"


def _changed(option: Option) -> bool:
    return option.efficiency == "slices" and option.settings.recompute == "none"


def _most_useful(options: Iterable[Option]) -> list[Option]:
    """Return, per method and efficiency setting, the fewest modules that fit, or else those with the least memory."""
    best: dict[tuple[str, str], Option] = {}
    for option in options:
        key = (option.method, _efficiency_text(option))
        known = best.get(key)
        if known is None or (not known.fits and option.peak_bytes < known.peak_bytes):
            best[key] = option
    return list(best.values())

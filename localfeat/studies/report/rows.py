"""Tables: runs that differ only in the seed form a row, rows of one dataset and budget form a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from localfeat.methods.registry import order_of
from localfeat.studies.report.published import Published, published_for
from localfeat.studies.report.runs import Run
from localfeat.studies.report.settings import (
    BLOCKS,
    Settings,
    below,
    dataset_name,
    frozen,
    labels,
    of_table,
    settings,
    varying,
)
from localfeat.studies.report.work import training_flops
from localfeat.utils.sizes import in_pixels

NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "stl10": "STL-10", "svhn": "SVHN"}


@dataclass(frozen=True, eq=False)
class Row:
    """Runs that differ only in the seed.

    Attributes:
        number: within the table, from 1; plots name rows by it.
        label: the method and what tells the row from the others.
        settings: what the runs share.
        runs: by seed.
    """

    number: int
    label: str
    settings: Settings
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        return str(self.settings["method.name"])

    @property
    def modules(self) -> int:
        return len(self.runs[0].blocks)

    @cached_property
    def accuracy_of_seed(self) -> dict[int, float]:
        """Seed -> accuracy (0 to 1). A seed that was run more than once counts once, with the mean of its runs."""
        seeds = sorted({run.seed for run in self.runs})
        return {seed: fmean(run.accuracy for run in self.runs if run.seed == seed) for seed in seeds}

    @property
    def repeated_seeds(self) -> list[int]:
        """Seeds that were run more than once."""
        return [seed for seed in self.accuracy_of_seed if sum(run.seed == seed for run in self.runs) > 1]

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds, 0 to 1."""
        return fmean(self.accuracy_of_seed.values())

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1) over the seeds; None for one seed."""
        return stdev(self.accuracy_of_seed.values()) if len(self.accuracy_of_seed) > 1 else None

    @property
    def peak_memory_bytes(self) -> int | None:
        """Highest peak of all runs; ``None`` if one of them was not measured."""
        found = [run.summary.get("peak_memory_bytes") for run in self.runs]
        return None if None in found else max(int(value) for value in found if value is not None)

    @property
    def images_per_second(self) -> float | None:
        """Median over the runs that were timed."""
        found = [run.summary.get("images_per_second") for run in self.runs]
        timed = [float(value) for value in found if value is not None]
        return median(timed) if timed else None

    @property
    def parameters(self) -> dict[str, int]:
        """Numbers by part: backbone, auxiliary, total, module_1, …"""
        found: dict[str, int] = self.runs[0].summary["parameters"]
        return found

    @cached_property
    def flops(self) -> float | None:
        """FLOPs of training one image, by accounting."""
        return training_flops(self.runs[0])

    @property
    def epochs(self) -> list[int]:
        """Epochs trained, each number once: early stopping may end seeds at different ones."""
        return sorted({int(run.summary["epochs"]) for run in self.runs})


@dataclass(frozen=True, eq=False)
class Table:
    """Rows that can be compared: one dataset, split, backbone, image size and budget.

    Attributes:
        title: unique within a report.
        elsewhere: end-to-end rows of tables that differ from this one in the number of epochs only.
    """

    number: int
    title: str
    settings: Settings
    rows: tuple[Row, ...]
    elsewhere: tuple[Row, ...] = ()

    @property
    def split(self) -> str:
        return self.rows[0].runs[0].split

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for run in row.runs]

    @property
    def end_to_end(self) -> list[Row]:
        return [row for row in self.rows if row.method == "e2e"]

    def baseline(self, row: Row) -> Row | None:
        """The end-to-end row that ``row`` is compared with; None for end-to-end rows, and where there is none.

        Of several the one that shares most settings with it, of equal ones the first.
        """
        if row.method == "e2e" or not self.end_to_end:
            return None
        return min(self.end_to_end, key=lambda other: len(_unshared(row, other)))

    def published(self, row: Row) -> Published:
        """Return the published figures for this row's setting."""
        return published_for(row.settings)

    def to_baseline(self, row: Row) -> float | None:
        """Return the accuracy minus that of :meth:`baseline`, in points."""
        other = self.baseline(row)
        return None if other is None else 100 * (row.mean - other.mean)

    def relative_flops(self, row: Row) -> float | None:
        """Return the FLOPs of training an image, relative to the least that end-to-end training takes in the table."""
        least = min((other.flops for other in self.end_to_end if other.flops), default=None)
        return None if least is None or row.flops is None else row.flops / least

    def at_equal_flops(self, row: Row) -> float | None:
        """Return the accuracy minus that of end-to-end training for as many FLOPs, in points.

        Between two numbers of epochs at which it was trained its accuracy is interpolated; beyond them there is none,
        nor where training ended early or was limited to a number of batches.
        """
        other, ratio, epochs = self.baseline(row), self.relative_flops(row), _whole_epochs(row)
        if other is None or ratio is None or epochs is None:
            return None
        wanted = ratio * epochs
        alike = [r for r in (other, *self.elsewhere) if _but_epochs(r, other)]
        known = sorted((count, r.mean) for r in alike if (count := _whole_epochs(r)) is not None)
        for (few, low), (many, high) in pairwise(known):
            if few <= wanted <= many:
                return 100 * (row.mean - low - (high - low) * (wanted - few) / (many - few))
        return None

    def memory_saved(self, row: Row) -> float | None:
        """Return the share (0 to 1) of the baseline's peak memory that ``row`` saves."""
        other = self.baseline(row)
        if other is None or row.peak_memory_bytes is None or not other.peak_memory_bytes:
            return None
        return 1 - row.peak_memory_bytes / other.peak_memory_bytes

    def to_published(self, row: Row) -> float | None:
        """Return the accuracy minus the published one, in points."""
        figure = self.published(row).accuracy
        return None if figure is None else 100 * row.mean - figure

    def common(self) -> Settings:
        """Settings that all rows have, with one value."""
        differing = set(varying([row.settings for row in self.rows]))
        return {key: value for key, value in self.rows[0].settings.items() if key not in differing}


def _whole_epochs(row: Row) -> int | None:
    """Return how often a row's runs saw all images; ``None`` if they ended early or counted batches."""
    epochs, limits = row.settings["epochs"], (row.settings.get(f"trainer.{key}") for key in _LIMITS)
    return int(epochs) if row.epochs == [epochs] and all(limit in (None, 1.0, -1) for limit in limits) else None


_LIMITS = ("limit_train_batches", "max_steps")


def _but_epochs(row: Row, other: Row) -> bool:
    return not [key for key in varying([row.settings, other.settings]) if key != "epochs"]


def _unshared(row: Row, other: Row) -> list[str]:
    own = ("method", "decoder", BLOCKS)
    return [key for key in varying([row.settings, other.settings]) if not below(key, own)]


def rows(runs: Sequence[Run]) -> list[Row]:
    """The rows of all tables that ``runs`` make, in the order of the tables."""
    return [row for table in tables(runs) for row in table.rows]


def tables(runs: Sequence[Run], order: dict[Path, int] | None = None) -> list[Table]:
    """The tables that ``runs`` make.

    Args:
        order: where a study has each run's folder; rows follow it, others by method, modules and name. Tables of one
            dataset stand together, test accuracy first.
    """
    groups: dict[Any, list[Run]] = {}
    for run in sorted(runs, key=lambda run: _place(run, order or {})):
        groups.setdefault(frozen(of_table(settings(run))), []).append(run)
    datasets = list(dict.fromkeys(dataset_name(group[0]) for group in groups.values()))
    together = sorted(groups.values(), key=lambda group: (datasets.index(dataset_name(group[0])), group[0].split))
    found = [_rows(group) for group in together]
    shared = [of_table(group[0].settings) for group in found]
    titles = _titles(found, shared)
    numbered = enumerate(zip(titles, shared, found, strict=True), start=1)
    made = [Table(number, title, common, tuple(group)) for number, (title, common, group) in numbered]
    return [replace(table, elsewhere=_elsewhere(table, made)) for table in made]


def _elsewhere(table: Table, made: Sequence[Table]) -> tuple[Row, ...]:
    others = (other for other in made if varying([table.settings, other.settings]) == ["epochs"])
    return tuple(row for other in others for row in other.end_to_end)


def _place(run: Run, order: dict[Path, int]) -> tuple[Any, ...]:
    place = order.get(run.folder.resolve(), len(order))
    if place < len(order):
        return (0, place, "")
    name = str(run.config["method"]["name"])
    return (1, dataset_name(run), order_of(name), name, len(run.blocks), str(run.folder))


def _rows(runs: Iterable[Run]) -> list[Row]:
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(frozen(settings(run)), []).append(run)
    members = [sorted(group, key=lambda run: (run.seed, str(run.folder))) for group in groups.values()]
    shared = [settings(group[0]) for group in members]
    named = zip(labels(shared), shared, members, strict=True)
    return [Row(number, label, found, tuple(group)) for number, (label, found, group) in enumerate(named, start=1)]


def _titles(groups: Sequence[Sequence[Row]], shared: Sequence[Settings]) -> list[str]:
    """Dataset, image size, epochs and split; where that leaves two tables alike, in what they differ."""
    short = [_title(group[0]) for group in groups]
    found = []
    for title, own in zip(short, shared, strict=True):
        alike = [other for name, other in zip(short, shared, strict=True) if name == title]
        told = [f"{key.removeprefix('backbone.')}={_value(own, key)}" for key in varying(alike)]
        found.append(", ".join([title, *told]))
    return found


def _value(found: Settings, key: str) -> str:
    from localfeat.studies.report.settings import shown_value

    return shown_value(found[key]) if key in found else "(not set)"


def _title(row: Row) -> str:
    run = row.runs[0]
    dataset = dataset_name(run)
    epochs = run.config["epochs"]
    parts = [
        NAMES.get(dataset, dataset.replace("image_folder ", "image folder ")),
        in_pixels(run.config["image_size"]),
        f"{epochs} epoch{'' if epochs == 1 else 's'}",
        f"{run.split} accuracy",
    ]
    return ", ".join(parts)

"""The data of a table's plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from localfeat.run.construct import construct
from localfeat.studies.report.cells import GIB
from localfeat.studies.report.rows import Row, Table
from localfeat.studies.report.runs import Run
from localfeat.utils.errors import UserError

Probe = Literal["linear_probe", "knn"]


@dataclass(frozen=True)
class Point:
    """A row by peak memory (GiB) and accuracy (per cent)."""

    row: Row
    memory: float
    accuracy: float
    std: float | None


@dataclass(frozen=True)
class Curve:
    """A row's mean over seeds at each ``x``, and the sample standard deviation where there are two seeds or more.

    ``marked`` are the places (indices) to mark.
    """

    row: Row
    x: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...] | None
    marked: tuple[int, ...] = ()


@dataclass(frozen=True)
class Weights:
    """Rows whose local modules weigh their losses alike: ``reconstruction`` lambda_i, ``supervision`` gamma_i."""

    rows: tuple[Row, ...]
    reconstruction: tuple[float, ...] | None
    supervision: tuple[float, ...]


def memory_points(table: Table) -> list[Point]:
    """Return the rows whose memory was measured."""
    return [
        Point(row, row.peak_memory_bytes / GIB, 100 * row.mean, None if row.std is None else 100 * row.std)
        for row in table.rows
        if row.peak_memory_bytes is not None
    ]


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points with more accuracy than any point of no more memory; least memory first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.memory, -point.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def learning_curves(table: Table) -> list[Curve]:
    """Validation accuracy (per cent) against epochs done, over those epochs that all seeds of a row have."""
    return [curve for row in table.rows if (curve := _learning_curve(row)) is not None]


def _learning_curve(row: Row) -> Curve | None:
    found = [run.validation for run in row.runs]
    epochs = sorted(set.intersection(*(set(values) for values in found)))
    return _curve(row, epochs, [[100 * values[epoch] for epoch in epochs] for values in found]) if epochs else None


def _curve(row: Row, x: Sequence[float], values: Sequence[Sequence[float]], marked: Sequence[int] = ()) -> Curve:
    """``values``: one sequence for each run of ``row``."""
    seeds = [run.seed for run in row.runs]
    of_seed = [[v for s, v in zip(seeds, values, strict=True) if s == seed] for seed in sorted(set(seeds))]
    by_place = list(zip(*([fmean(place) for place in zip(*own, strict=True)] for own in of_seed), strict=True))
    std = tuple(map(stdev, by_place)) if len(of_seed) > 1 else None
    return Curve(row, tuple(x), tuple(map(fmean, by_place)), std, tuple(marked))


def depth_curves(table: Table, probe: Probe) -> list[Curve]:
    """Accuracy (per cent) of a probe on every block's output, 0 being the patch embeddings.

    A row needs an inspection of all its runs; ends of modules are marked.
    """
    return [curve for row in table.rows if (curve := _depth_curve(row, probe)) is not None]


def _depth_curve(row: Row, probe: Probe) -> Curve | None:
    found = [run.inspection for run in row.runs]
    blocks = [inspection["blocks"] for inspection in found if inspection is not None]
    if len(blocks) < len(row.runs) or len({len(own) for own in blocks}) > 1:
        return None
    x = [0 if block["block"] == "embedding" else int(block["block"]) + 1 for block in blocks[0]]
    marked = [index for index, block in enumerate(blocks[0]) if block.get("ends_module")]
    return _curve(row, x, [[100 * float(block[probe]) for block in own] for own in blocks], marked)


def loss_weights(table: Table) -> list[Weights]:
    """Weights of the local losses, module by module; rows with the same ones together.

    Only of rows that have local modules and localfeat's own class of methods: what others weigh is not known.
    """
    groups: dict[Any, list[Row]] = {}
    for row in table.rows:
        if (found := _weights(row.runs[0])) is not None:
            groups.setdefault(found, []).append(row)
    return [Weights(tuple(rows), *found) for found, rows in groups.items()]


def _weights(run: Run) -> tuple[tuple[float, ...] | None, tuple[float, ...]] | None:
    from localfeat.backbones.layout import FeatureShape
    from localfeat.methods.head_and_decoder import HeadAndDecoder
    from localfeat.methods.site import Site

    config: Mapping[str, Any] = run.config["method"]
    modules = len(run.blocks)
    if modules < 2 or str(config.get("_target_")).rsplit(".", 1)[-1] != "HeadAndDecoder":
        return None
    try:
        method = construct(dict(config), "method")
    except UserError:  # a method of another version, with other keys
        return None
    if type(method) is not HeadAndDecoder:
        return None
    shape = FeatureShape("NCHW", 1, 1, 1)  # weights do not depend on it
    sites = [Site(index, modules, shape, shape, (1, 1), 2) for index in range(modules - 1)]
    gamma = tuple(site.interpolate(*method.supervision_weight) for site in sites)
    if method.reconstruct is None:
        return None, gamma
    return tuple(site.interpolate(*method.reconstruction_weight) for site in sites), gamma

"""Search for the best trade of memory against work: which cuts, which recomputed blocks, in how many slices.

Every module recomputes as many of its first blocks as it must (in a hierarchical backbone the first ones are the
largest), all in one way. For a limit on a module's peak, the split with the least work is a shortest path over
blocks; limits from the lowest possible to the highest give the Pareto front. Work is FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from experiments.memory.cases import Case, efficiencies, mixed
from experiments.memory.composition import Composition
from localfeat.memory.module_costs import ModuleCost

LIMITS = 60
"""Number of limits on a module's peak tried for every way of recomputing, evenly spaced on a log scale."""


class Way(NamedTuple):
    """A way to recompute blocks."""

    recompute: str
    slices: int


WAYS = (Way("selective", 1), *(Way("checkpoint", slices) for slices in (1, 2, 4, 8, 16)))


@dataclass(frozen=True)
class Found:
    """A setting and the figures composed from its pieces."""

    case: Case
    peak_bytes: int
    flops: float


def front(composition: Composition, method: str, ways: Iterable[Way] = WAYS) -> list[Found]:
    """Return the settings of a method that no other setting beats in both peak and work, by falling peak."""
    found = [setting for way in ways for setting in _Search(composition, method, way).settings()]
    return pareto(found)


def pareto(found: Sequence[Found]) -> list[Found]:
    """Return the settings that no other setting beats."""
    best: list[Found] = []
    for setting in sorted(found, key=lambda s: (s.flops, s.peak_bytes)):
        if not best or setting.peak_bytes < best[-1].peak_bytes:
            best.append(setting)
    return best


def within(settings: Sequence[Found], flops: float) -> Found | None:
    """Return the setting with the least memory among those that need at most ``flops``."""
    return min((s for s in settings if s.flops <= flops), key=lambda s: s.peak_bytes, default=None)


class _Search:
    """The search over one method and one way of recomputing."""

    def __init__(self, composition: Composition, method: str, way: Way) -> None:
        self.composition, self.way = composition, way
        self.case = Case(method, efficiency=efficiencies()["lean"])
        self.kept = composition.costs(self.case)
        self.again = composition.costs(replace(self.case, efficiency=mixed(None, *way)))
        self.blocks = self.kept.blocks
        self.local = self.kept.setting.method.local
        edges = [(a, b) for a in range(self.blocks) for b in range(a + 1, self.blocks + 1)]
        edges = edges if self.local else [(0, self.blocks)]
        self.variants = {edge: self._variants(*edge) for edge in edges}

    def _variants(self, start: int, stop: int) -> list[ModuleCost]:
        """Return the module with its first 0, 1, 2 … blocks recomputed."""
        kept, again = self.kept.pieces_of(start, stop), self.again.pieces_of(start, stop)
        stem = len(kept.chain) - (stop - start)  # the first module begins with the stem, which is never recomputed
        return [
            replace(kept, chain=[*again.chain[: stem + count], *kept.chain[stem + count :]]).combined()
            for count in range(stop - start + 1)
        ]

    def settings(self) -> list[Found]:
        """Return the best division for every limit."""
        peaks = [module.peak for variants in self.variants.values() for module in variants]
        low, high = math.log(min(peaks)), math.log(max(peaks))
        limits = [math.exp(low + (high - low) * step / LIMITS) * (1 + 1e-9) for step in range(LIMITS + 1)]
        divisions = {division for limit in limits if (division := self._least_work(limit)) is not None}
        return [self._found(division) for division in sorted(divisions)]

    def _least_work(self, limit: float) -> tuple[tuple[int, int, int], ...] | None:
        """Return the modules (start, stop, recomputed blocks) with the fewest FLOPs, all within the limit."""
        best: dict[int, tuple[float, tuple[tuple[int, int, int], ...]]] = {0: (0.0, ())}
        for start, stop in sorted(self.variants):
            count = next((n for n, s in enumerate(self.variants[start, stop]) if s.peak <= limit), None)
            whole_network = self.local and stop - start == self.blocks  # a local method has at least two modules
            if start not in best or count is None or whole_network:
                continue
            flops, before = best[start]
            candidate = (flops + self.variants[start, stop][count].flops, (*before, (start, stop, count)))
            if stop not in best or candidate < best[stop]:
                best[stop] = candidate
        return best[self.blocks][1] if self.blocks in best else None

    def _found(self, division: tuple[tuple[int, int, int], ...]) -> Found:
        modules = [self.variants[start, stop][count] for start, stop, count in division]
        recomputed = [start + 1 + i for start, _, count in division for i in range(count)]
        if len(recomputed) == self.blocks:
            efficiency = mixed(None, *self.way)
        else:
            efficiency = mixed(recomputed, *self.way) if recomputed else self.case.efficiency
        case = replace(self.case, cuts=tuple(stop for _, stop, _ in division[:-1]), efficiency=efficiency)
        peak = self.kept.persistent.total + sum(s.persistent for s in modules) + max(s.peak for s in modules)
        return Found(case, round(peak), sum(s.flops for s in modules))

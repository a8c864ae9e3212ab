"""The cheapest division that fits into a budget, with only so many blocks recomputed as must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

from localfeat.efficiency.settings import Efficiency
from localfeat.memory.balance import cheapest_cuts
from localfeat.memory.parts import Segment
from localfeat.memory.planner import MOST_MODULES, Option, Planner, without_recomputation


def fitted(planner: Planner) -> Iterator[Option]:
    """For every method the cheapest cuts of all that fit, with only so many blocks recomputed as must be."""
    recomputing = planner.efficiencies.get("slices")
    if recomputing is None:
        return
    for name, method in planner.methods.items():
        if "slices" not in planner.possible(name):
            continue
        found: list[Option] = []
        for fused in {False, recomputing.fused_attention}:
            settings = replace(recomputing, fused_attention=fused)
            division = Fitted(planner, name, without_recomputation(settings), settings).search(method.local)
            if division is not None:
                cuts, blocks = division
                found.append(planner.option(name, "slices", cuts, balanced=False, blocks=blocks, fused=fused))
        if found:
            yield min(found, key=lambda option: option.step_cost)


@dataclass
class Fitted:
    """The search behind :func:`fitted`.

    A module recomputes its first blocks, as many as it must: in a hierarchical backbone they are the largest, in a
    columnar one all are alike.
    """

    planner: Planner
    method: str
    plain: Efficiency
    recomputing: Efficiency
    _segments: dict[tuple[int, int], list[Segment]] = field(default_factory=dict)

    def search(self, local: bool) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Cuts and numbers of recomputed blocks of the cheapest division within the budget; ``None`` if none is."""
        planner = self.planner
        most = min(MOST_MODULES, planner.blocks) if local else 1
        limit = planner.budget - planner.standing
        for _ in range(4):  # the auxiliary parts stand there too, and depend on the cuts
            found = cheapest_cuts(partial(self._cost, limit), planner.blocks, most, 1 + local)
            if found is None:
                return None
            modules = [
                (edge, self._needed(limit, *edge) or 0, self._variants(*edge))
                for edge in pairwise([0, *found, planner.blocks])
            ]
            segments = [variants[count] for _, count, variants in modules]
            if planner.peak(segments) <= planner.budget:
                recomputed = [start + i + 1 for (start, _), count, _ in modules for i in range(count)]
                return tuple(found), tuple(recomputed)
            limit = planner.budget - planner.standing - sum(s.standing for s in segments)
        return None

    def _cost(self, limit: float, start: int, stop: int) -> float | None:
        count = self._needed(limit, start, stop)
        return None if count is None else self.planner.work(self._variants(start, stop)[count])

    def _needed(self, limit: float, start: int, stop: int) -> int | None:
        """How many first blocks must be recomputed."""
        return next((n for n, s in enumerate(self._variants(start, stop)) if s.peak <= limit), None)

    def _variants(self, start: int, stop: int) -> list[Segment]:
        """The module with its first 0, 1, 2 … blocks recomputed."""
        if (start, stop) not in self._segments:
            size = self.planner.workload.batch_size
            kept = self.planner.costs(self.method, self.plain, size).parts(start, stop)
            again = self.planner.costs(self.method, self.recomputing, size).parts(start, stop)
            stem = len(kept.chain) - (stop - start)  # the first module begins with the stem, which is not recomputed
            self._segments[start, stop] = [
                replace(kept, chain=again.chain[: stem + count] + kept.chain[stem + count :]).combined()
                for count in range(stop - start + 1)
            ]
        return self._segments[start, stop]

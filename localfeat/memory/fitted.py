"""The cheapest division that fits into a budget, with as few blocks recomputed as possible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

from localfeat.efficiency.settings import Efficiency
from localfeat.memory.balance import cheapest_cuts
from localfeat.memory.pieces import ModuleCost
from localfeat.memory.planner import MOST_MODULES, Option, Planner, without_recomputation


def fitted(planner: Planner) -> Iterator[Option]:
    """Yield the cheapest cuts that fit for every method, with as few blocks recomputed as possible."""
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

    A module recomputes as few of its first blocks as possible: in a hierarchical backbone they are the largest, in a
    columnar one all are equal.
    """

    planner: Planner
    method: str
    plain: Efficiency
    recomputing: Efficiency
    _modules: dict[tuple[int, int], list[ModuleCost]] = field(default_factory=dict)

    def search(self, local: bool) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return cuts and recomputed blocks (from 1) of the cheapest division that fits; ``None`` if none does."""
        planner = self.planner
        most = min(MOST_MODULES, planner.blocks) if local else 1
        limit = planner.budget - planner.persistent
        for _ in range(4):  # auxiliary parts are persistent too, and depend on the cuts
            found = cheapest_cuts(partial(self._cost, limit), planner.blocks, most, 1 + local)
            if found is None:
                return None
            modules = [
                (edge, self._needed(limit, *edge) or 0, self._variants(*edge))
                for edge in pairwise([0, *found, planner.blocks])
            ]
            costs = [variants[count] for _, count, variants in modules]
            if planner.peak(costs) <= planner.budget:
                recomputed = [start + i + 1 for (start, _), count, _ in modules for i in range(count)]
                return tuple(found), tuple(recomputed)
            limit = planner.budget - planner.persistent - sum(s.persistent for s in costs)
        return None

    def _cost(self, limit: float, start: int, stop: int) -> float | None:
        if not self.planner.methods[self.method].local and stop - start < self.planner.blocks:
            return None  # there is no such module
        count = self._needed(limit, start, stop)
        return None if count is None else self.planner.work(self._variants(start, stop)[count])

    def _needed(self, limit: float, start: int, stop: int) -> int | None:
        """Return how many first blocks must be recomputed; ``None`` if all are not enough."""
        return next((n for n, s in enumerate(self._variants(start, stop)) if s.peak <= limit), None)

    def _variants(self, start: int, stop: int) -> list[ModuleCost]:
        """Return the module's costs with its first 0, 1, 2 … blocks recomputed."""
        if (start, stop) not in self._modules:
            size = self.planner.workload.batch_size
            kept = self.planner.costs(self.method, self.plain, size).pieces_of(start, stop)
            again = self.planner.costs(self.method, self.recomputing, size).pieces_of(start, stop)
            stem = len(kept.chain) - (stop - start)  # the first module begins with the stem, which is not recomputed
            self._modules[start, stop] = [
                replace(kept, chain=again.chain[: stem + count] + kept.chain[stem + count :]).combined()
                for count in range(stop - start + 1)
            ]
        return self._modules[start, stop]

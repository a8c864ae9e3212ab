"""Cuts that minimise the peak memory of a step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from localfeat.memory.module_costs import ModuleCost
from localfeat.utils.errors import UserError


def balanced_cuts(cost: Callable[[int, int], ModuleCost], blocks: int, modules: int) -> list[int]:
    """Return the cuts into ``modules`` local modules with the lowest peak of a whole step, exactly.

    A step's peak is that of its largest module plus the persistent memory, which includes the auxiliary parts of all
    modules and so depends on the cuts. For every possible peak of the largest module, dynamic programming finds the
    cheapest auxiliary parts; the lowest sum wins. Ties go to the most equal modules (least sum of squares).

    Args:
        cost: returns the cost of the module of blocks ``start`` to ``stop`` (exclusive).
        blocks: number of blocks in the backbone.
        modules: number of local modules, K.

    Returns:
        K - 1 increasing numbers of blocks, one per cut.

    Raises:
        UserError: more modules than blocks.
    """
    if modules > blocks:
        raise UserError(f"{modules} local modules need {modules} blocks: this backbone has {blocks}")
    table = {
        (start, stop): cost(start, stop)
        for start in range(blocks)
        for stop in range(start + 1, blocks + 1)
        if _possible(start, stop, blocks, modules)
    }
    limits = sorted({found.peak for found in table.values()})
    lowest = bisect_left(limits, True, key=lambda limit: _cheapest(table, blocks, modules, limit) is not None)
    auxiliary = (found.persistent for (_, stop), found in table.items() if stop < blocks)
    least_persistent = (modules - 1) * min(auxiliary, default=0.0)
    best: tuple[float, float, tuple[int, ...]] | None = None
    for limit in limits[lowest:]:
        if best is not None and limit + least_persistent > best[0]:
            break  # no higher limit can win
        division = _cheapest(table, blocks, modules, limit)
        assert division is not None  # the lowest limit was possible
        persistent, squares, cuts = division
        candidate = (limit + persistent, squares, cuts)
        best = candidate if best is None else min(best, candidate)
    assert best is not None
    return list(best[2])


def _possible(start: int, stop: int, blocks: int, modules: int) -> bool:
    """Tell whether some division into that many modules contains this one."""
    before, after = int(start > 0), int(stop < blocks)
    return before + 1 + after <= modules <= start + 1 + blocks - stop


def _cheapest(
    table: dict[tuple[int, int], ModuleCost], blocks: int, modules: int, limit: float
) -> tuple[float, float, tuple[int, ...]] | None:
    """Return (auxiliary bytes, sum of squared peaks, cuts) of the best division with no module above ``limit``."""
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for module in range(1, modules + 1):
        following: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for start, (persistent, squares, cuts) in best.items():
            stops = [blocks] if module == modules else range(start + 1, blocks)
            for stop in stops:
                found = table.get((start, stop))
                if found is None or found.peak > limit:
                    continue
                cut = (*cuts, stop) if stop < blocks else cuts
                candidate = (persistent + found.persistent, squares + found.peak**2, cut)
                if stop not in following or candidate < following[stop]:
                    following[stop] = candidate
        best = following
    return best.get(blocks)


def cheapest_cuts(
    cost: Callable[[int, int], float | None], blocks: int, most: int, fewest: int = 1
) -> list[int] | None:
    """Return the cuts into ``fewest`` to ``most`` modules with the lowest sum of costs; ties go to fewer modules.

    Args:
        cost: returns the cost of the module of blocks ``start`` to ``stop`` (exclusive); ``None`` if it does not fit.
        blocks: number of blocks in the backbone.

    Returns:
        Increasing numbers of blocks, one per cut; ``None`` if no division fits.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    answers: list[tuple[float, int, tuple[int, ...]]] = []
    for module in range(1, most + 1):
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (total, cuts) in best.items():
            for stop in range(start + 1, blocks + 1):
                price = cost(start, stop)
                if price is None:
                    continue
                candidate = (total + price, (*cuts, stop))
                if stop not in following or candidate < following[stop]:
                    following[stop] = candidate
        if blocks in following and module >= fewest:
            total, stops = following[blocks]
            answers.append((total, module, stops[:-1]))
        best = {stop: found for stop, found in following.items() if stop < blocks}
    return list(min(answers)[2]) if answers else None

"""Cuts that minimise the peak memory of a step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from localfeat.memory.segments import Segment
from localfeat.utils.errors import UserError


def balanced_cuts(segment: Callable[[int, int], Segment], blocks: int, modules: int) -> list[int]:
    """The cuts into ``modules`` local modules with the lowest peak of a whole step, exactly.

    A step's peak is that of its largest module plus what stands all the time, and that includes the auxiliary parts of
    all modules, which depend on the cuts. So for every value that the largest module's peak can take, the cheapest
    auxiliary parts are found by dynamic programming; the best sum wins. Among equal ones the modules are as
    equal as they can be (least sum of squares).

    Args:
        segment: costs of the module of blocks ``start`` to ``stop`` (exclusive).
        blocks: of the backbone.
        modules: K.

    Returns:
        K - 1 rising numbers of blocks.

    Raises:
        UserError: more modules than blocks.
    """
    if modules > blocks:
        raise UserError(f"{modules} local modules need {modules} blocks: this backbone has {blocks}")
    table = {
        (start, stop): segment(start, stop)
        for start in range(blocks)
        for stop in range(start + 1, blocks + 1)
        if _possible(start, stop, blocks, modules)
    }
    limits = sorted({found.peak for found in table.values()})
    lowest = bisect_left(limits, True, key=lambda limit: _cheapest(table, blocks, modules, limit) is not None)
    auxiliary = (found.standing for (_, stop), found in table.items() if stop < blocks)
    least_standing = (modules - 1) * min(auxiliary, default=0.0)
    best: tuple[float, float, tuple[int, ...]] | None = None
    for limit in limits[lowest:]:
        if best is not None and limit + least_standing > best[0]:
            break  # no higher limit can win
        division = _cheapest(table, blocks, modules, limit)
        assert division is not None  # the lowest limit was possible
        standing, squares, cuts = division
        candidate = (limit + standing, squares, cuts)
        best = candidate if best is None else min(best, candidate)
    assert best is not None
    return list(best[2])


def _possible(start: int, stop: int, blocks: int, modules: int) -> bool:
    """Whether some division into that many modules has this one."""
    before, after = int(start > 0), int(stop < blocks)
    return before + 1 + after <= modules <= start + 1 + blocks - stop


def _cheapest(
    table: dict[tuple[int, int], Segment], blocks: int, modules: int, limit: float
) -> tuple[float, float, tuple[int, ...]] | None:
    """(auxiliary bytes, sum of squared peaks, cuts) of the best division without a module above ``limit``."""
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for module in range(1, modules + 1):
        following: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for start, (standing, squares, cuts) in best.items():
            stops = [blocks] if module == modules else range(start + 1, blocks)
            for stop in stops:
                found = table.get((start, stop))
                if found is None or found.peak > limit:
                    continue
                cut = (*cuts, stop) if stop < blocks else cuts
                candidate = (standing + found.standing, squares + found.peak**2, cut)
                if stop not in following or candidate < following[stop]:
                    following[stop] = candidate
        best = following
    return best.get(blocks)


def cheapest_cuts(
    cost: Callable[[int, int], float | None], blocks: int, most: int, fewest: int = 1
) -> list[int] | None:
    """The cuts with the lowest sum of costs, into ``fewest`` to ``most`` modules; of equal ones the fewest modules.

    Args:
        cost: of the module of blocks ``start`` to ``stop`` (exclusive); ``None`` if it is not possible.
        blocks: of the backbone.

    Returns:
        Rising numbers of blocks; ``None`` if there is no possible division.
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

"""Cuts found by dynamic programming against every possible division, on tables of made-up costs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localfeat.memory.balance import balanced_cuts, cheapest_cuts
from localfeat.memory.module_costs import ModuleCost
from localfeat.utils.errors import UserError

Table = dict[tuple[int, int], ModuleCost]
repeatable = settings(derandomize=True, database=None, deadline=None)


@st.composite
def tables(draw: st.DrawFn, most: int = 7) -> tuple[int, Table]:
    """Costs of every module of a network without any order in them; few values, so that there are ties."""
    blocks = draw(st.integers(1, most))
    peaks, auxiliaries = draw(st.sampled_from([(6, 3), (1000, 30), (1000, 3000), (50, 0)]))
    table = {}
    for start in range(blocks):
        for stop in range(start + 1, blocks + 1):
            persistent = 0 if stop == blocks else draw(st.integers(0, auxiliaries))
            table[start, stop] = ModuleCost(start, stop, draw(st.integers(1, peaks)), persistent, 0.0, 0.0)
    return blocks, table


def divisions(blocks: int, modules: int) -> Iterator[list[tuple[int, int]]]:
    for cuts in combinations(range(1, blocks), modules - 1):
        yield list(pairwise([0, *cuts, blocks]))


def step_peak(table: Table, edges: list[tuple[int, int]]) -> float:
    parts = [table[edge] for edge in edges]
    return max(part.peak for part in parts) + sum(part.persistent for part in parts)


def squares(table: Table, edges: list[tuple[int, int]]) -> float:
    return sum(table[edge].peak ** 2 for edge in edges)


@repeatable
@given(tables())
def test_no_division_has_a_lower_peak(drawn: tuple[int, Table]) -> None:
    blocks, table = drawn
    for modules in range(1, blocks + 1):
        cuts = balanced_cuts(lambda start, stop: table[start, stop], blocks, modules)
        assert len(cuts) == modules - 1 and cuts == sorted(set(cuts))
        found = list(pairwise([0, *cuts, blocks]))
        everything = list(divisions(blocks, modules))
        assert found in everything
        assert step_peak(table, found) == min(step_peak(table, edges) for edges in everything)


@repeatable
@given(tables())
def test_of_divisions_with_equal_shares_the_most_equal_one(drawn: tuple[int, Table]) -> None:
    """Among those with the lowest peak and the same auxiliary parts the squares of the modules' peaks are least."""
    blocks, table = drawn
    for modules in range(1, blocks + 1):
        cuts = balanced_cuts(lambda start, stop: table[start, stop], blocks, modules)
        found = list(pairwise([0, *cuts, blocks]))
        largest = max(table[edge].peak for edge in found)
        rivals = [
            edges
            for edges in divisions(blocks, modules)
            if step_peak(table, edges) == step_peak(table, found) and max(table[e].peak for e in edges) == largest
        ]
        assert squares(table, found) == min(squares(table, edges) for edges in rivals)


@repeatable
@given(tables())
def test_only_modules_that_some_division_has_are_asked_for(drawn: tuple[int, Table]) -> None:
    """Costs are measured on demand: nothing is measured for nothing."""
    blocks, table = drawn
    for modules in range(1, blocks + 1):
        possible = {edge for edges in divisions(blocks, modules) for edge in edges}
        asked = set()

        def module(start: int, stop: int, asked: set[tuple[int, int]] = asked) -> ModuleCost:
            asked.add((start, stop))
            return table[start, stop]

        balanced_cuts(module, blocks, modules)
        assert asked == possible


def test_more_modules_than_blocks() -> None:
    with pytest.raises(UserError, match=r"^4 local modules need 4 blocks: this backbone has 3$"):
        balanced_cuts(lambda start, stop: ModuleCost(start, stop, 1, 0, 0, 0), 3, 4)


def test_auxiliary_parts_are_worth_a_larger_module() -> None:
    """The lowest maximum is not the lowest peak: [1] has modules of 10 and 11, but 5 stand there; [2] none."""
    peaks = {(0, 1): 10, (1, 3): 11, (0, 2): 12, (2, 3): 4}
    persistent = {(0, 1): 5}
    assert balanced_cuts(lambda a, b: ModuleCost(a, b, peaks[a, b], persistent.get((a, b), 0), 0, 0), 3, 2) == [2]


# --- the cheapest division ---


@st.composite
def prices(draw: st.DrawFn) -> tuple[int, dict[tuple[int, int], float | None], int, int]:
    """Costs, some modules impossible, and the least and largest number of modules."""
    blocks, table = draw(tables())
    price = st.none() | st.integers(0, draw(st.sampled_from([3, 500])))
    costs = {edge: draw(price) for edge in table}
    fewest = draw(st.integers(1, blocks))
    return blocks, costs, fewest, draw(st.integers(fewest, blocks))


@repeatable
@given(prices())
def test_no_possible_division_is_cheaper(drawn: tuple[int, dict[tuple[int, int], float | None], int, int]) -> None:
    blocks, costs, fewest, most = drawn
    possible = []
    for modules in range(fewest, most + 1):
        for edges in divisions(blocks, modules):
            found = [costs[edge] for edge in edges]
            if None not in found:
                possible.append((sum(cost for cost in found if cost is not None), modules))
    cuts = cheapest_cuts(lambda start, stop: costs[start, stop], blocks, most, fewest)
    if not possible:
        assert cuts is None
        return
    assert cuts is not None
    chosen = [costs[edge] for edge in pairwise([0, *cuts, blocks])]
    assert None not in chosen
    assert (sum(cost for cost in chosen if cost is not None), len(cuts) + 1) == min(possible)

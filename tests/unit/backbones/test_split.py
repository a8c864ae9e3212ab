"""Splits of networks of all shapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localfeat.backbones.split import Split, as_split
from localfeat.utils.errors import UserError

SWIN_TINY = (2, 2, 6, 2)
depths_of_stages = st.lists(st.integers(1, 24), min_size=1, max_size=12)


def refused(split: object, depths: tuple[int, ...] = SWIN_TINY) -> str:
    with pytest.raises(UserError) as error:
        as_split(split, depths).blocks_per_module(depths)
    assert "\n" not in str(error.value)
    return str(error.value)


@given(depths_of_stages, st.integers(1, 60), st.sampled_from(["stages", "blocks"]))
def test_every_split_holds_every_block_once(depths: list[int], modules: int, by: str) -> None:
    split = Split(modules, by=by)
    possible = modules <= sum(depths) and (by == "blocks" or len(depths) % modules == 0)
    if not possible:
        with pytest.raises(UserError) as error:
            split.blocks_per_module(depths)
        assert "\n" not in str(error.value)
        assert str(modules) in str(error.value)
        return
    parts = split.blocks_per_module(depths)
    assert len(parts) == modules
    assert sum(parts) == sum(depths)
    assert min(parts) >= 1
    if by == "blocks":
        assert parts == sorted(parts)
        assert max(parts) - min(parts) <= 1


@given(depths_of_stages, st.data())
def test_cuts_are_where_they_are_said_to_be(depths: list[int], data: st.DataObject) -> None:
    total = sum(depths)
    inner = st.sets(st.integers(1, total - 1)) if total > 1 else st.just(set())
    cuts = sorted(data.draw(inner))
    parts = Split(cuts=cuts).blocks_per_module(depths)
    assert [sum(parts[: i + 1]) for i in range(len(parts))] == [*cuts, total]


@given(depths_of_stages, st.lists(st.integers(-3, 30), max_size=5))
def test_impossible_cuts_are_refused_in_one_line(depths: list[int], cuts: list[int]) -> None:
    total = sum(depths)
    if all(0 < c < total for c in cuts) and cuts == sorted(set(cuts)):
        assert sum(Split(cuts=cuts).blocks_per_module(depths)) == total
    else:
        assert str(cuts) in refused(cuts, tuple(depths))


@given(depths_of_stages, st.data())
def test_the_short_form_takes_any_possible_number(depths: list[int], data: st.DataObject) -> None:
    modules = data.draw(st.integers(1, sum(depths)))
    parts = as_split(modules, depths).blocks_per_module(depths)
    assert (len(parts), sum(parts)) == (modules, sum(depths))
    assert min(parts) >= 1


def test_the_papers_cuts_of_swin_tiny() -> None:
    assert as_split(2, SWIN_TINY).blocks_per_module(SWIN_TINY) == [4, 8]
    assert as_split(4, SWIN_TINY).blocks_per_module(SWIN_TINY) == [2, 2, 6, 2]
    assert as_split(1, SWIN_TINY).blocks_per_module(SWIN_TINY) == [12]
    assert as_split(12, SWIN_TINY).blocks_per_module(SWIN_TINY) == [1] * 12


def test_other_ways_to_write_a_split() -> None:
    assert as_split([1, 2, 5], SWIN_TINY).blocks_per_module(SWIN_TINY) == [1, 1, 3, 7]
    assert as_split(3, SWIN_TINY).blocks_per_module(SWIN_TINY) == [4, 4, 4]
    assert as_split(5, SWIN_TINY).blocks_per_module(SWIN_TINY) == [2, 2, 2, 3, 3]
    assert as_split(4, [1] * 12).blocks_per_module([1] * 12) == [3, 3, 3, 3]
    own = Split(4, by="blocks")
    assert as_split(own, SWIN_TINY) is own


def test_what_is_refused() -> None:
    assert refused(0) == "split.modules=0: a network has at least 1 local module"
    assert "13 local modules need 13 blocks: this backbone has 12" in refused(13)
    assert "4 stages cannot be shared equally by 3 local modules" in refused(Split(3))
    for arguments in ({}, {"modules": 2, "cuts": [1]}):
        with pytest.raises(UserError, match=r"either modules=K or cuts="):
            Split(**arguments)
    with pytest.raises(UserError, match=r"split.by=stage: it must be stages or blocks"):
        Split(2, by="stage")

"""The stratified split and the epoch's order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localfeat.data.sampling import EpochBatches, stratified_split
from localfeat.utils.errors import UserError


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(20, 90), min_size=1, max_size=12),
    fraction=st.floats(0.06, 0.94),
    seed=st.integers(0, 2**31),
)
def test_stratified_split_keeps_class_shares(counts: list[int], fraction: float, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels))]
    kept, held = stratified_split(labels, fraction, seed)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert len(held) == round(fraction * len(labels))
    per_class = torch.bincount(labels[held], minlength=len(counts))
    assert ((per_class - fraction * torch.tensor(counts)).abs() < 1 + 1e-6).all()
    again = stratified_split(labels, fraction, seed)
    assert torch.equal(again[0], kept) and torch.equal(again[1], held)


def test_other_seed_other_split() -> None:
    labels = torch.arange(100) % 4
    assert not torch.equal(stratified_split(labels, 0.2, 0)[1], stratified_split(labels, 0.2, 1)[1])


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_class_without_an_image_is_an_error(fraction: float) -> None:
    with pytest.raises(UserError, match="leaves class 0"):
        stratified_split(torch.arange(20) % 2, fraction, 0)


def test_epochs_are_permutations_of_their_own() -> None:
    batches = EpochBatches(103, 10, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        drawn = list(batches)
        assert len(drawn) == len(batches) == 10 and all(len(batch) == 10 for batch in drawn)
        orders.append(torch.tensor(drawn).flatten())
        assert len(orders[-1].unique()) == 100
    assert torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[1])
    assert not torch.equal(torch.tensor(list(EpochBatches(103, 10, seed=4))).flatten(), orders[0])


def test_resume_skips_once_and_only_in_its_epoch() -> None:
    whole = EpochBatches(50, 5, seed=0)
    whole.set_epoch(2)
    expected = list(whole)
    resumed = EpochBatches(50, 5, seed=0)
    resumed.resume = (2, 7)
    resumed.set_epoch(2)
    assert len(resumed) == 10
    assert list(resumed) == expected[7:]
    assert len(list(resumed)) == 10
    other = EpochBatches(50, 5, seed=0)
    other.resume = (2, 7)
    assert len(list(other)) == 10  # epoch 0


def test_processes_share_an_epoch_without_overlap() -> None:
    parts = [list(EpochBatches(64, 8, 0, rank, 4)) for rank in range(4)]
    assert len(torch.tensor(parts).unique()) == 64

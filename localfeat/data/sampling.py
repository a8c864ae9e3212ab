"""The stratified split and the shuffled batches of an epoch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from localfeat.utils.errors import UserError


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divide N images into a kept and a held-out part with the same class shares.

    Every class gives ``fraction`` of its images, rounded down; the images still needed for ``round(fraction * N)``
    come from the classes with the largest remainders (ties: the lower class first). At least one image of each
    class is held out and one is kept.

    Args:
        labels: (N,) int64.
        fraction: share held out, in (0, 1).
        seed: seed of the random choice within each class.

    Returns:
        Sorted indices of the kept and of the held-out images.

    Raises:
        UserError: a class has too few images for both parts.
    """
    counts = torch.bincount(labels)
    quotas = _quotas(counts, fraction)
    short = (counts > 0) & ((quotas < 1) | (quotas >= counts))
    if short.any():
        first = int(short.nonzero()[0])
        raise UserError(
            f"holding out a fraction of {fraction} leaves class {first} ({int(counts[first])} images) without an image "
            "in one of the two parts; choose another fraction (val_fraction=0 holds out nothing)"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[torch.argsort(labels[order], stable=True)]  # grouped by class, random within
    rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[labels[order]]
    held = rank < quotas[labels[order]]
    return order[~held].sort().values, order[held].sort().values


def _quotas(counts: Tensor, fraction: float) -> Tensor:
    exact = counts.double() * fraction
    quotas = exact.floor().long()
    missing = round(fraction * int(counts.sum())) - int(quotas.sum())
    by_remainder = torch.argsort(exact - quotas, descending=True, stable=True)
    quotas[by_remainder[: max(0, missing)]] += 1
    return quotas


class EpochBatches:
    """Batches of shuffled indices, a pure function of (seed, epoch); an incomplete last one is dropped.

    They are lists, as a worker process would take tensors through a connection that breaks when it is killed.

    ``len()`` is always the number of batches of a whole epoch, even when the first iteration resumes within
    one: Lightning itself counts the batches already done.

    Args:
        size: number of images.
        batch_size: images per batch and process.
        seed: seed of the permutations.
        rank, world_size: this process's number and the number of processes; each process sees every
            ``world_size``-th image of the permutation.
        shuffle: whether every epoch has its own permutation; otherwise all use the first one's.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, shuffle: bool = True
    ) -> None:
        self.shuffle = shuffle
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.resume = (0, 0)  # (epoch, batch) at which the first iteration starts
        self.begun: int | None = None  # the epoch iterated last

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate; Lightning calls it at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.world_size // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        self.begun = epoch = self.epoch
        first = self.resume[1] if self.resume[0] == epoch else 0
        self.resume = (0, 0)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + (epoch if self.shuffle else 0))
        order = torch.randperm(self.size, generator=generator)[self.rank :: self.world_size].tolist()
        for batch in range(first, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]

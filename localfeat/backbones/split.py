"""Splits: how many consecutive blocks each local module gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, runtime_checkable

from localfeat.utils.errors import UserError

Downsample = Literal["next", "previous"]


@dataclass(frozen=True)
class Split:
    """A rule that divides any number of blocks into local modules.

    ``by="stages"`` gives every module the same number of whole stages (the paper's cuts: K=2 is {1, 2 | 3, 4},
    K=4 one stage per module; in a ViT every block counts as a stage). ``by="blocks"`` divides the blocks as
    equally as possible; the last modules, whose features are the smallest in a hierarchical network, get one
    more where K does not divide them. ``cuts`` lists the cuts themselves: a cut c lies after the c-th block.
    ``downsample`` says to which of the two blocks around them layers between stages belong: the ``next``, as in timm,
    or the ``previous``, as in the paper, whose cuts come after them.
    """

    modules: int | None = None
    by: Literal["stages", "blocks"] = "stages"
    cuts: Sequence[int] | None = None
    downsample: Downsample = "next"

    def __post_init__(self) -> None:
        if (self.modules is None) == (self.cuts is None):
            raise UserError("a split takes either modules=K or cuts=[…], not both")
        if self.modules is not None and self.modules < 1:
            raise UserError(f"split.modules={self.modules}: a network has at least 1 local module")
        if self.by not in ("stages", "blocks"):
            raise UserError(f"split.by={self.by}: it must be stages or blocks")
        check_downsample(self.downsample)

    def blocks_per_module(self, stage_depths: Sequence[int]) -> list[int]:
        """Return the number of blocks in each local module, first to last, for stages of the given depths."""
        total = sum(stage_depths)
        if self.cuts is not None:
            return _from_cuts(self.cuts, total)
        assert self.modules is not None
        if self.modules > total:
            raise UserError(
                f"split.modules={self.modules}: {self.modules} local modules need {self.modules} blocks: "
                f"this backbone has {total}"
            )
        if self.by == "blocks":
            return _evenly(total, self.modules)
        if len(stage_depths) % self.modules:
            raise UserError(
                f"split.modules={self.modules}: {len(stage_depths)} stages cannot be shared equally by "
                f"{self.modules} local modules: use split=even split.modules={self.modules}"
            )
        size = len(stage_depths) // self.modules
        return [sum(stage_depths[i : i + size]) for i in range(0, len(stage_depths), size)]


def check_downsample(downsample: str) -> None:
    """Raise a :class:`UserError` for an unknown place of the layers between stages."""
    if downsample not in ("next", "previous"):
        raise UserError(f"split.downsample={downsample}: it must be next or previous")


def downsample_of(split: Any) -> Downsample:
    """Return where a split leaves the layers between stages; the shorthands leave them to the next block."""
    return split.downsample if isinstance(split, Split) else "next"


@runtime_checkable
class ResolvableSplit(Protocol):
    """A split that depends on the backbone, the method and the efficiency settings."""

    def resolve(
        self, backbone: Any, method: Any, decoder: Any, *, image_size: int | Sequence[int] | None, efficiency: Any
    ) -> Split:
        """Return the split for a backbone, a method, a decoder factory and efficiency settings."""
        ...


def as_split(split: Split | int | Sequence[int], stage_depths: Sequence[int]) -> Split:
    """Return the :class:`Split` for a shorthand: K (by stages if K divides them, else by blocks) or a list of cuts."""
    if isinstance(split, Split):
        return split
    if isinstance(split, int):
        return Split(split, by="blocks" if split < 1 or len(stage_depths) % split else "stages")
    if not isinstance(split, Sequence) or not all(isinstance(cut, int) for cut in split):
        raise UserError(f"split={split!r}: give K, a list of cuts, a localfeat.Split or a localfeat.BalancedSplit")
    return Split(cuts=tuple(split))


def _evenly(total: int, modules: int) -> list[int]:
    small, larger = divmod(total, modules)
    return [small] * (modules - larger) + [small + 1] * larger


def _from_cuts(cuts: Sequence[int], total: int) -> list[int]:
    edges = [0, *cuts, total]
    if any(after <= before for before, after in pairwise(edges)):
        raise UserError(
            f"split.cuts={list(cuts)}: cuts must rise and lie between 1 and {total - 1} (after that many blocks)"
        )
    return [after - before for before, after in pairwise(edges)]

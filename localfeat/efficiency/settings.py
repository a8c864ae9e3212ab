"""Settings that change the time and memory of training, never its results beyond floating-point noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from localfeat.utils.errors import UserError


@dataclass(frozen=True)
class Efficiency:
    """How a step is computed; what it computes stays the same.

    Args:
        fused_attention: windowed attention as one operation that keeps queries, keys and values and no attention
            matrix. ViTs have timm's fused attention in any case.
        loss_slices: compute the reconstruction loss and its gradient in this many slices of the batch on the way
            forward, so that neither the whole prediction nor the whole target is ever alive. Fewer slices where they
            would have less than four images.
        recompute: ``checkpoint`` keeps the input of every block and computes the rest again in the backward pass;
            ``selective`` keeps the results of matrix multiplications and convolutions and computes only what is cheap
            again (norms, activations, softmax).
        blocks: numbers, from 1, of the backbone's blocks that are recomputed; ``None`` for all.
        slices: under ``checkpoint``, compute blocks again in this many slices of the batch, one at a time.
        fused_mlp: the second half of every MLP, activation and second linear layer, as one operation whose backward
            pass makes no tensor of the hidden width. MLPs of other kinds than ViT's and Swin's stay as they are.
        compile: ``torch.compile`` every local module; it goes with none of the others.

    Raises:
        UserError: values out of range, settings that exclude each other.
    """

    fused_attention: bool = False
    loss_slices: int = 1
    recompute: Literal["none", "checkpoint", "selective"] = "none"
    blocks: Sequence[int] | None = None
    slices: int = 1
    fused_mlp: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.recompute not in ("none", "checkpoint", "selective"):
            raise UserError(f"efficiency.recompute={self.recompute}: it is one of none, checkpoint, selective")
        for key in ("slices", "loss_slices"):
            if getattr(self, key) < 1:
                raise UserError(f"efficiency.{key}={getattr(self, key)}: it must be at least 1")
        if self.slices > 1 and self.recompute != "checkpoint":
            raise UserError(f"efficiency.slices={self.slices} needs efficiency.recompute=checkpoint")
        if self.blocks is not None and self.recompute == "none":
            raise UserError("efficiency.blocks names blocks to recompute: set efficiency.recompute too")
        if self.blocks is not None and min(self.blocks, default=1) < 1:
            raise UserError(f"efficiency.blocks={list(self.blocks)}: blocks are counted from 1")
        if self.compile and any(getattr(self, f.name) != f.default for f in fields(self) if f.name != "compile"):
            raise UserError("efficiency.compile goes with no other efficiency setting: the compiler makes its own")

    def recomputes(self, block: int) -> bool:
        """Whether block number ``block``, from 0, is computed again in the backward pass."""
        return self.recompute != "none" and (self.blocks is None or block + 1 in self.blocks)

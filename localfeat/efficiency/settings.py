"""Settings that change the time and memory of training, never its results beyond floating-point noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from localfeat.utils.errors import UserError


@dataclass(frozen=True)
class Efficiency:
    """Settings of how a step is computed; its results stay the same.

    Args:
        fused_attention: whether windowed attention runs as one operation that keeps queries, keys and values but no
            attention matrix. ViTs always use timm's fused attention.
        loss_slices: number of slices of the batch in which the forward pass computes the reconstruction loss and its
            gradient, so that neither the whole prediction nor the whole target is ever alive. Fewer if a slice would
            have less than four images.
        recompute: ``checkpoint`` keeps the input of every block and recomputes the rest in the backward pass;
            ``selective`` keeps the results of matrix multiplications and convolutions and recomputes only cheap
            operations (norms, activations, softmax).
        blocks: numbers, from 1, of the backbone's blocks to recompute; ``None`` means all.
        slices: number of slices of the batch in which ``checkpoint`` recomputes blocks, one at a time.
        fused_mlp: whether the second half of every MLP, activation and second linear layer, runs as one operation whose
            backward pass makes no tensor of the hidden width. MLPs other than ViT's and Swin's stay as they are.
        compile: whether to ``torch.compile`` every local module; excludes all other settings.

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
            raise UserError(f"efficiency.recompute={self.recompute}: it must be none, checkpoint or selective")
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
            raise UserError("efficiency.compile excludes all other efficiency settings: the compiler chooses its own")

    def recomputes(self, block: int) -> bool:
        """Return whether block number ``block``, from 0, is recomputed in the backward pass."""
        return self.recompute != "none" and (self.blocks is None or block + 1 in self.blocks)

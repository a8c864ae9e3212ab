"""A block twice, as a trained copy and as a moving average, before a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from localfeat.methods.objective import HeadObjective
from localfeat.methods.parts.above import copied


class TwoCopies(nn.Module):
    """``s · copy(x) + (2 - s) · average(x)`` of a block that belongs to another module.

    Args:
        block: the block; it is not registered.
        momentum: share of the average that stays at every update.
        learned: whether s is a parameter, from 1; otherwise it is 1.
    """

    def __init__(self, block: nn.Module, momentum: float, learned: bool) -> None:
        super().__init__()
        self._original = (block,)
        self.momentum = momentum
        self.copy = copied(block)
        self.average = copied(block).requires_grad_(False)
        self.share = nn.Parameter(torch.ones(())) if learned else None

    def forward(self, features: Tensor) -> Tensor:
        """Return the block's output shape."""
        one, other = self.copy(features), self.average(features)
        return one + other if self.share is None else self.share * one + (2 - self.share) * other

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the block; its statistics, which also see its own batches, too."""
        own, now = self.average.state_dict(keep_vars=True), self._original[0].state_dict(keep_vars=True)
        for name, value in own.items():
            if value.is_floating_point():
                value.lerp_(now[name], 1 - self.momentum)
            else:
                value.copy_(now[name])


class AveragedObjective(HeadObjective):
    """Cross entropy of a head after :class:`TwoCopies`, whose average follows the block after every step."""

    def __init__(
        self, block: nn.Module, head: nn.Module, momentum: float, learned: bool, label_smoothing: float
    ) -> None:
        self_copies = TwoCopies(block, momentum, learned)
        super().__init__(nn.Sequential(self_copies, head), label_smoothing)

    def after_step(self) -> None:
        """Update the average."""
        self.head[0].update()  # type: ignore[index]

"""Persistent memory, alive during the whole step: weights, optimizer states, and gradients under accumulation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from localfeat.learner.nonfinite import statistics
from localfeat.memory.tracker import rounded

STATES = 2
"""Tensors of a parameter's size that AdamW keeps."""
SCRATCH = 3
"""Tensors of a parameter's size that AdamW allocates to update one parameter when it is not fused."""


@dataclass(frozen=True)
class Keeping:
    """Which tensors a run keeps between steps.

    Args:
        fused_optimizer: whether the optimizer is fused: its step counters are on the device, one scalar per parameter,
            and it needs no scratch. Never under a loss scale.
        accumulates: whether gradients add up over several batches, so that those of all modules are persistent.
        ema: whether a moving average of weights and buffers is on the device.
    """

    fused_optimizer: bool = True
    accumulates: bool = False
    ema: bool = False

    def scratch(self, modules: Iterable[nn.Module]) -> int:
        """Return the most bytes that an optimizer step over these modules allocates temporarily."""
        if self.fused_optimizer:
            return 0
        sizes = (p.untyped_storage().nbytes() for m in modules for p in m.parameters() if p.requires_grad)
        return SCRATCH * rounded(max(sizes, default=0))


class Persistent(NamedTuple):
    """Bytes that are alive during the whole step."""

    weights: int
    optimizer_state: int
    gradients: int = 0

    @property
    def total(self) -> int:
        return sum(self)

    @classmethod
    def of(cls, module: nn.Module, keeping: Keeping | None = None) -> Persistent:
        """Return the persistent bytes of a module, training's copies of its BatchNorm statistics included."""
        keeping = keeping or Keeping()
        tensors = {id(t): t for t in [*module.parameters(), *module.buffers()]}
        weights = sum(rounded(t.untyped_storage().nbytes()) for t in tensors.values())
        copies = sum(rounded(t.untyped_storage().nbytes()) for t in statistics(module))
        trained = [rounded(p.untyped_storage().nbytes()) for p in module.parameters() if p.requires_grad]
        counters = rounded(4) * len(trained) if keeping.fused_optimizer else 0
        gradients = sum(trained) if keeping.accumulates else 0
        return cls(weights * (1 + keeping.ema) + copies, STATES * sum(trained) + counters, gradients)

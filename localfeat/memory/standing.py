"""What is in memory all the time, whatever a step does: weights, optimizer states, what is kept between steps."""

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
"""Tensors of a parameter's size that AdamW makes for its update, one parameter at a time, where it is not fused."""


@dataclass(frozen=True)
class Keeping:
    """How a run keeps its parameters.

    Args:
        fused_optimizer: the optimizer is fused: it has its step counters on the device, one scalar per parameter, and
            needs no scratch. It is not under a loss scale.
        accumulates: gradients of several batches pile up, so that those of all modules stay.
        ema: there is a moving average of weights and buffers on the device.
    """

    fused_optimizer: bool = True
    accumulates: bool = False
    ema: bool = False

    def scratch(self, modules: Iterable[nn.Module]) -> int:
        """The most bytes that an optimizer step over these modules makes and frees."""
        if self.fused_optimizer:
            return 0
        sizes = (p.untyped_storage().nbytes() for m in modules for p in m.parameters() if p.requires_grad)
        return SCRATCH * rounded(max(sizes, default=0))


class Standing(NamedTuple):
    """Bytes that are there all the time."""

    weights: int
    optimizer_state: int
    gradients: int = 0

    @property
    def total(self) -> int:
        return sum(self)

    @classmethod
    def of(cls, module: nn.Module, keeping: Keeping | None = None) -> Standing:
        """Of a module's parameters and buffers, and of the copies of BatchNorm's statistics that go with training."""
        keeping = keeping or Keeping()
        tensors = {id(t): t for t in [*module.parameters(), *module.buffers()]}
        weights = sum(rounded(t.untyped_storage().nbytes()) for t in tensors.values())
        copies = sum(rounded(t.untyped_storage().nbytes()) for t in statistics(module))
        trained = [rounded(p.untyped_storage().nbytes()) for p in module.parameters() if p.requires_grad]
        counters = rounded(4) * len(trained) if keeping.fused_optimizer else 0
        gradients = sum(trained) if keeping.accumulates else 0
        return cls(weights * (1 + keeping.ema) + copies, STATES * sum(trained) + counters, gradients)

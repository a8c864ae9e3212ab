"""The autocast state of a forward pass, kept for recomputation in the backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

EMULATED_BY = "cpu"
"""The meta device has no autocast: an emulation uses the CPU's switch instead, which meta tensors ignore."""

_emulations: list[object] = []
"""The active emulations (``localfeat.memory.emulation`` registers itself here)."""


@dataclass(frozen=True)
class AutocastState:
    """Whether autocast is on for a device type, its dtype, and whether it keeps cast copies of the weights.

    A backward pass runs with autocast off, so recomputing a forward pass there has to restore the state:
    ``state = AutocastState.of(x.device)`` in the forward pass, ``with state.restored(): ...`` around the recomputation.
    ``device_type`` is None on the meta device outside an emulation, as it then has no autocast.
    """

    device_type: str | None
    enabled: bool
    dtype: torch.dtype
    cache_enabled: bool

    @classmethod
    def of(cls, device: torch.device | str) -> AutocastState:
        """Return the current state for the type of ``device``; for the meta device, an active emulation's or none."""
        kind = torch.device(device).type
        if kind == "meta":
            if not _emulations:
                return cls(None, False, torch.float32, False)
            kind = EMULATED_BY
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return cls(kind, enabled, dtype, torch.is_autocast_cache_enabled())

    def restored(self) -> AbstractContextManager[object]:
        """Return a context in which exactly this state is set."""
        if self.device_type is None:
            return nullcontext()
        return torch.autocast(self.device_type, self.dtype, self.enabled, self.cache_enabled)


def without_autocast(device: torch.device | str) -> AbstractContextManager[object]:
    """Return a context without autocast on any device; ``torch.autocast("meta", ...)`` raises outside an emulation."""
    return replace(AutocastState.of(device), enabled=False).restored()

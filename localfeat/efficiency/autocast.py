"""The autocast state of a forward pass, kept for what computes again in the backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

EMULATED_BY = "cpu"
"""The meta device has no autocast: an emulation uses the CPU's switch for it, which meta tensors do not obey."""

_emulations: list[object] = []
"""The emulations that are active (``localfeat.memory.emulation`` enters itself here)."""


@dataclass(frozen=True)
class AutocastState:
    """Whether autocast is on for a device type, its dtype, and whether it keeps cast copies of the weights.

    A backward pass runs with autocast off, so what computes a forward pass again there has to restore the state:
    ``state = AutocastState.of(x.device)`` on the way forward, ``with state.restored(): ...`` at the recomputation.
    ``device_type`` is None on the meta device outside an emulation: it has no autocast then.
    """

    device_type: str | None
    enabled: bool
    dtype: torch.dtype
    cache_enabled: bool

    @classmethod
    def of(cls, device: torch.device | str) -> AutocastState:
        """The state now, for the type of ``device``. The meta device has that of an active emulation, else none."""
        kind = torch.device(device).type
        if kind == "meta":
            if not _emulations:
                return cls(None, False, torch.float32, False)
            kind = EMULATED_BY
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return cls(kind, enabled, dtype, torch.is_autocast_cache_enabled())

    def restored(self) -> AbstractContextManager[object]:
        """Sets exactly this state for the duration."""
        if self.device_type is None:
            return nullcontext()
        return torch.autocast(self.device_type, self.dtype, self.enabled, self.cache_enabled)


def without_autocast(device: torch.device | str) -> AbstractContextManager[object]:
    """Autocast off for the duration, on any device: ``torch.autocast("meta", ...)`` raises outside an emulation."""
    return replace(AutocastState.of(device), enabled=False).restored()

"""The autocast state of a forward pass, kept for what computes again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class EmulatedAutocast:
    """Autocast of the meta device, which has none: the state that an emulation reads at every operation."""

    enabled: bool
    dtype: torch.dtype


_emulated: list[EmulatedAutocast] = []
"""State of the emulations that are active, the innermost last (``localfeat.memory.emulation`` pushes it)."""


@dataclass(frozen=True)
class AutocastState:
    """Whether autocast is on for a device type, its dtype, and whether it keeps cast copies of the weights.

    A backward pass runs with autocast off, so what computes a forward pass again there has to restore the state:
    ``state = AutocastState.of(x.device)`` on the way forward, ``with state.restored(): ...`` at the recomputation.
    """

    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache_enabled: bool

    @classmethod
    def of(cls, device: torch.device | str) -> AutocastState:
        """The state now, for the type of ``device``. The meta device has that of an emulation, else none."""
        kind = torch.device(device).type
        if kind == "meta":
            state = _emulated[-1] if _emulated else EmulatedAutocast(False, torch.float32)
            return cls(kind, state.enabled, state.dtype, cache_enabled=False)
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return cls(kind, enabled, dtype, torch.is_autocast_cache_enabled())

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Sets exactly this state for the duration."""
        if self.device_type != "meta":
            with torch.autocast(self.device_type, self.dtype, self.enabled, self.cache_enabled):
                yield
        elif not _emulated:
            yield  # outside an emulation the meta device computes in the dtype that it is given
        else:
            state = _emulated[-1]
            before = state.enabled, state.dtype
            state.enabled, state.dtype = self.enabled, self.dtype
            try:
                yield
            finally:
                state.enabled, state.dtype = before

"""One peak per local module, from accounting or from the device's own statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn


class ModuleWindows:
    """The peak of every module of a list that runs one after the other, in one training batch.

    A module's window goes from the start of its forward pass to that of the next module's: its forward and backward
    pass and its optimizer step. The first one begins with the batch, whose preparation it contains; the last one
    ends where ``close`` is called. Hooks are on the modules until then.

    Args:
        modules: called ``module_1``, ``module_2``, … in ``peaks``; may be empty.
        take_peak: returns the peak in bytes since its last call, and starts a new one.

    Attributes:
        peaks: bytes by module, of the windows that have ended.
        overall: bytes, the largest of all windows, also where there are no modules.
    """

    def __init__(self, modules: Iterable[nn.Module], take_peak: Callable[[], int]) -> None:
        self.peaks: dict[str, int] = {}
        self.overall = 0
        self._take_peak = take_peak
        self._current: str | None = None
        self._hooks = [
            module.register_forward_pre_hook(partial(self._enter, f"module_{number}"))
            for number, module in enumerate(modules, start=1)
        ]
        take_peak()  # discard the peak before this batch

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        if self._current is not None:  # else the batch has been prepared, and this is the first module
            self._end_window()
        self._current = name

    def _end_window(self) -> None:
        peak = self._take_peak()
        self.overall = max(self.overall, peak)
        if self._current is not None:
            self.peaks[self._current] = max(self.peaks.get(self._current, 0), peak)

    def close(self) -> None:
        """End the last window and remove the hooks."""
        self.remove()
        self._end_window()

    def remove(self) -> None:
        """Remove the hooks without ending a window."""
        for hook in self._hooks:
            hook.remove()

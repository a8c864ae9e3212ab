"""Non-finite losses and gradients: the module's step is skipped and counted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localfeat.utils.errors import Diverged

STATISTICS = ("running_", "num_batches_tracked")
"""Name prefixes of the buffers that a forward pass changes in training mode (BatchNorm and the like)."""

_ANOMALY = re.compile(r"Function '(\w+)' returned nan values in its (\d+)th output")


@dataclass(frozen=True)
class Trouble:
    """One non-finite value.

    Attributes:
        module: the module's number, from 1.
        term: the term of its loss, ``loss`` for the sum, or ``gradient``.
        value: nan or an infinity.
        parameter: the first parameter with a non-finite gradient; ``None`` for losses.
    """

    module: int
    term: str
    value: float
    parameter: str | None = None

    def __str__(self) -> str:
        where = f" ({self.parameter})" if self.parameter else ""
        return f"module {self.module}'s {self.term}{where} is {self.value}"


class AnomalyFound(Diverged):
    """torch's anomaly detection has found NaN in a module's backward pass.

    Attributes:
        module: the module's number, from 1.
        operation: the operation that returned NaN.
    """

    def __init__(self, module: int, operation: str, place: str) -> None:
        super().__init__(f"module {module} at {place}: {operation}")
        self.module, self.operation = module, operation


def statistics(module: nn.Module) -> list[Tensor]:
    """Return the buffers of ``module`` that a forward pass changes in training mode."""
    return [part.get_buffer(name) for part, name in _places(module)]


def _places(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (part, name)
        for part in module.modules()
        for name, _ in part.named_buffers(recurse=False)
        if name.startswith(STATISTICS)
    ]


class _Window:
    """State of one module since its last optimizer step.

    Attributes:
        trace: scalar, 0 if all losses were finite, else NaN; ``None`` before the first batch.
        norms: gradient norms of the last step before clipping, (parameters with a gradient,).
        skips: bool scalar, whether the last step was skipped.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._places = _places(module)  # found once: walking through all modules takes as long as a small step
        self.held: list[Tensor] = []  # the statistics before the window; always the same tensors
        self.trace: Tensor | None = None
        self.norms: Tensor | None = None
        self.skips: Tensor | None = None

    def _statistics(self) -> list[Tensor]:
        return [getattr(part, name) for part, name in self._places]

    def begin(self) -> None:
        """Keep the statistics as they are before the window's first batch."""
        if self.trace is not None:
            return
        now = self._statistics()
        if len(self.held) != len(now):
            self.held = [buffer.clone() for buffer in now]
        for held, buffer in zip(self.held, now, strict=True):
            held.copy_(buffer)

    def see(self, loss: Tensor) -> None:
        trace = loss.detach() * 0
        self.trace = trace if self.trace is None else self.trace + trace

    def put_back(self, bad: Tensor) -> None:
        """Restore the statistics before the window if ``bad``, a bool scalar on the device (no synchronisation)."""
        for buffer, held in zip(self._statistics(), self.held, strict=True):
            buffer.copy_(torch.where(bad, held, buffer))

    def parameter_not_finite(self, optimizer: torch.optim.Optimizer) -> tuple[str | None, float]:
        """Return name and norm of the first non-finite gradient; no name if only their total overflows."""
        assert self.norms is not None
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        stepped = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        norms = self.norms.tolist()
        if len(norms) == len(stepped):  # else some parameters had no gradient, and the names are lost
            for name, norm in zip(stepped, norms, strict=True):
                if not math.isfinite(norm):
                    return name, norm
        return None, next((norm for norm in norms if not math.isfinite(norm)), math.inf)


class NonFinite:
    """Find non-finite losses and gradients, make the optimizer skip that step, and count the skipped steps.

    Everything happens on the device without synchronisation: the fused AdamW reads ``found_inf`` itself. A skipped step
    leaves the module's weights, moments and BatchNorm statistics as they were before the step's first batch.

    Args:
        modules: the local modules, in order.

    Attributes:
        scaler: the GradScaler, if any. It skips steps itself to find its scale: these are counted separately, unless
            the loss itself is not finite or the scale has fallen below 1.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.scaler: torch.amp.GradScaler | None = None
        self._windows = [_Window(module) for module in modules]
        self._skipped = torch.zeros(len(modules), dtype=torch.int64)
        self._in_a_row = torch.zeros(len(modules), dtype=torch.int64)
        self._scaler_skips: Tensor | None = None

    def start(self, device: torch.device, scaler: torch.amp.GradScaler | None) -> None:
        """Move counters and restored state to ``device`` before the first batch of a fit."""
        self.scaler = scaler
        if scaler is not None and self._scaler_skips is None:
            self._scaler_skips = torch.zeros((), dtype=torch.int64)
        self._skipped, self._in_a_row = self._skipped.to(device), self._in_a_row.to(device)
        if self._scaler_skips is not None:
            self._scaler_skips = self._scaler_skips.to(device)
        for window in self._windows:
            window.norms = None
            window.held = [tensor.to(device) for tensor in window.held]
            window.trace = None if window.trace is None else window.trace.to(device)

    # --- within a batch -----------------------------------------------------------------------------------------

    @property
    def held(self) -> list[Tensor]:
        """Copies of BatchNorm's running statistics, kept between steps."""
        return [tensor for window in self._windows for tensor in window.held]

    def begin(self, module: int) -> None:
        """Keep a module's statistics (from 0) before its forward pass."""
        self._windows[module].begin()

    def see_loss(self, module: int, loss: Tensor) -> None:
        """Check a module's scalar loss: it is not finite if one of its terms is not."""
        self._windows[module].see(loss)

    def wait(self, module: int) -> None:
        """Restore the statistics after a batch that only accumulates if its loss was not finite."""
        window = self._windows[module]
        if window.held and window.trace is not None:
            window.put_back(window.trace.isnan())

    def poison(self, module: int, optimizer: Any) -> None:
        """Make a GradScaler see a non-finite loss whose gradient is finite."""
        trace = self._windows[module].trace
        if self.scaler is None or trace is None:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            gradients[0].add_(trace)

    def before_step(self, module: int, optimizer: torch.optim.Optimizer) -> Tensor:
        """Decide from its unscaled gradients whether a module steps, and return their norm, a scalar."""
        window = self._windows[module]
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        window.norms = _norms(gradients, window.module)
        norm = torch.linalg.vector_norm(window.norms)
        trace = norm.new_zeros(()) if window.trace is None else window.trace
        skips = ~(norm + trace).isfinite()
        if self.scaler is None:
            if optimizer.defaults.get("fused"):
                optimizer.found_inf = skips.float()  # type: ignore[attr-defined]
        elif self.scaler.get_scale() >= 1:
            bad = trace.isnan()
            assert self._scaler_skips is not None
            self._scaler_skips += skips & ~bad
            skips = bad
        window.skips = skips
        if window.held:
            window.put_back(skips)
        window.trace = None
        return norm

    def count(self) -> None:
        """Count skipped steps after a batch in which every module's optimizer was to step."""
        skips = torch.stack([window.skips for window in self._windows if window.skips is not None])
        self._skipped += skips
        self._in_a_row = (self._in_a_row + 1) * skips

    # --- what was counted ---------------------------------------------------------------------------------------

    @property
    def total(self) -> Tensor:
        """Steps skipped by all modules together, a scalar on the device."""
        return self._skipped.sum()

    @property
    def skipped(self) -> list[int]:
        """Steps skipped by every module. Waits for the device."""
        return [int(count) for count in self._skipped.tolist()]

    @property
    def in_a_row(self) -> list[int]:
        """Steps skipped by every module since its last successful step."""
        return [int(count) for count in self._in_a_row.tolist()]

    @property
    def stepped(self) -> bool:
        """Whether a step was tried since the fit began; until then the counts are the checkpoint's."""
        return self._windows[-1].norms is not None

    @property
    def scaler_skips(self) -> int | None:
        """Steps that the GradScaler skipped itself; ``None`` without a GradScaler."""
        return None if self._scaler_skips is None else int(self._scaler_skips)

    def trouble(self, module: int, figures: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Trouble:
        """Return the non-finite value in the last step of a module (from 0). Waits for the device.

        Args:
            figures: the batch's figures of all modules, ``train/module_1/contrast`` … and ``train/module_1/loss``. If
                the module's own are all finite, its gradient was not.
            optimizer: the module's optimizer.
        """
        prefix = f"train/module_{module + 1}/"
        own = {name.removeprefix(prefix): value for name, value in figures.items() if name.startswith(prefix)}
        for term in sorted(own, key=lambda name: name == "loss"):  # the sum last: it is the least specific
            if not math.isfinite(value := float(own[term])):
                return Trouble(module + 1, term, value)
        parameter, value = self._windows[module].parameter_not_finite(optimizer)
        return Trouble(module + 1, "gradient", value, parameter)

    # --- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, and the current accumulation window's earlier statistics and whether it is spoiled."""
        windows = [
            {"spoiled": bool(window.trace.isnan()), "statistics": window.held}
            for window in self._windows
            if window.trace is not None
        ]
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row, "scaler_skips": self.scaler_skips}
        return {**counts, "windows": windows if len(windows) == len(self._windows) else []}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of ``state_dict``; it stays on the CPU until ``start``."""
        self._skipped, self._in_a_row = torch.tensor(state["skipped"]), torch.tensor(state["in_a_row"])
        scaler_skips = state["scaler_skips"]
        self._scaler_skips = None if scaler_skips is None else torch.tensor(scaler_skips)
        for window, saved in zip(self._windows, state["windows"], strict=False):  # empty between windows
            window.trace = torch.tensor(math.nan if saved["spoiled"] else 0.0)
            window.held = list(saved["statistics"])


def anomaly(error: RuntimeError) -> str | None:
    """Return the operation that torch's anomaly detection names; ``None`` for any other error."""
    found = _ANOMALY.search(str(error))
    return None if found is None else f"{found[1]} returned nan (its output {found[2]}) in the backward pass"


def _norms(gradients: Sequence[Tensor], module: nn.Module) -> Tensor:
    """Return the norm of every gradient (n,), computed as torch's clipping does."""
    if not gradients:
        return next(module.parameters()).new_zeros(1)
    if gradients[0].device.type == "meta":  # which has no foreach kernels
        return torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    return torch.stack(torch._foreach_norm(list(gradients)))

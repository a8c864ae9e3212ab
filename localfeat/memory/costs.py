"""The cost of every piece (stem, block, objective) on its own, measured on the meta device.

A local module is a chain of pieces whose allocations do not depend on each other. Running each piece once, forward and
backward, therefore gives the peak of every module that could be cut out of a backbone:
:mod:`localfeat.memory.module_costs` adds the pieces up.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from localfeat.memory.tracker import StorageTracker, rounded
from localfeat.memory.work import WorkCounter
from localfeat.methods.objective import Objective


@dataclass(frozen=True)
class PieceCost:
    """Bytes and work of one piece of a local module at one batch size, without its weights.

    Peaks are relative to the bytes alive when the piece's forward pass began; the incoming gradient counts as the
    piece's own.
    """

    kept: float  # alive after the forward pass: tensors saved for backward, and the output
    forward_peak: float
    backward_peak: float  # including the kept bytes, but the output only if it was saved
    backward_peak_input: float  # the same if the input is held elsewhere until the end
    backward_peak_output: float  # the same without the output's bytes if the output is held elsewhere until the end
    backward_peak_both: float  # if both are
    output: float  # bytes of its output
    output_saved: bool  # whether its own backward pass needs its output
    input_saved: bool  # whether its backward pass needs its input; otherwise the forward pass frees it
    gradients: float  # of its parameters
    flops: float  # of matrix products, convolutions and attention; forward, recomputation and backward
    traffic: float  # bytes read and written by all operations

    def backward_peak_with(self, *, input_held: bool, output_held: bool) -> float:
        """Return the peak of the backward pass, with input and output held elsewhere or not."""
        if output_held:
            return self.backward_peak_both if input_held else self.backward_peak_output
        return self.backward_peak_input if input_held else self.backward_peak


class _Entrance(torch.autograd.Function):
    """The input of a piece, as if an earlier piece had made it; its backward pass reports that the gradient arrived."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, arrived: Callable[[], None]) -> Tensor:
        ctx.arrived = arrived
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.arrived()
        return None, None, None


def _anchor() -> Tensor:
    """Return a scalar that makes ``_Entrance`` need a gradient: autograd would keep a leaf of the input's size."""
    return torch.empty((), device="meta", requires_grad=True)


class _Exit(torch.autograd.Function):
    """A scalar whose backward pass makes new gradients of the output, as the next piece would, and of the terms."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, started: Callable[[], None], *terms: Tensor) -> Tensor:
        ctx.started, ctx.shape, ctx.dtype, ctx.terms = started, output.shape, output.dtype, len(terms)
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradient = torch.empty(ctx.shape, dtype=ctx.dtype, device="meta")
        ctx.started()
        return gradient, None, *(torch.empty((), device="meta") for _ in range(ctx.terms))


class _Gauge:
    """Levels and peaks of a tracker relative to a starting point; a new peak starts when a watched tensor is freed."""

    def __init__(self, tracker: StorageTracker) -> None:
        self.tracker, self.start = tracker, tracker.live_bytes
        self._peaks: list[tuple[int, frozenset[str]]] = []  # and what had been freed since the last ``take``
        self._freed: frozenset[str] = frozenset()
        tracker.reset_peak()

    @property
    def level(self) -> int:
        return self.tracker.live_bytes - self.start

    def begin(self) -> None:
        self.tracker.reset_peak()

    def end(self) -> None:
        self._peaks.append((self.tracker.peak_bytes - self.start, self._freed))

    def freed(self, name: str, unnoticed: int = 0) -> None:
        """Start a new peak without the tensor of this name, whose bytes the tracker may not have noticed yet."""
        self.end()
        self._freed |= {name}
        self.tracker.reset_peak(unnoticed)

    def highest(self, **held: int) -> int:
        """Return the peak since the last ``take``, as if these tensors (name -> bytes) had not been freed."""
        return max(peak + sum(size for name, size in held.items() if name in freed) for peak, freed in self._peaks)

    def take(self) -> int:
        """Return the peak so far, and begin anew."""
        found = self.highest()
        self._peaks, self._freed = [], frozenset()
        return found


@contextmanager
def _counting(
    target: AbstractContextManager[Any], existing: Iterable[Tensor]
) -> Iterator[tuple[StorageTracker, WorkCounter]]:
    with ExitStack() as stack:
        tracker = stack.enter_context(StorageTracker(existing))
        del existing  # or its tensors would never be freed
        counter = stack.enter_context(WorkCounter())
        stack.enter_context(target)
        yield tracker, counter


def measure_piece(
    run: Callable[[Tensor], Tensor],
    entry: Callable[[], Tensor],
    module: nn.Module,
    target: AbstractContextManager[Any],
    *,
    first: bool,
    objective: Objective | None = None,
) -> PieceCost:
    """Measure the forward and backward pass of a stem or a block on meta.

    Args:
        run: the piece.
        entry: makes its input, on meta.
        module: the stem or block, for its parameters and buffers; gradients are removed.
        target: the emulation of the device.
        first: whether the piece is the first of its local module: its input then needs no gradient.
        objective: the module's objective, if it watches blocks.
    """
    parameters, x = list(module.parameters()), entry()
    entered = rounded(x.untyped_storage().nbytes())
    gauges: list[_Gauge] = []
    begun = weakref.ref(x.untyped_storage(), lambda _: gauges[0].freed("input"))  # after the tracker has noticed
    with _counting(target, [x, *parameters, *module.buffers()]) as (tracker, counter):
        gauge = _Gauge(tracker)
        gauges.append(gauge)
        x = x if first else _Entrance.apply(x, _anchor(), gauge.end)
        with nullcontext() if objective is None else objective.watch():
            output = run(x)
        terms = [] if objective is None else [*objective.watched_terms().values()]
        gauge.end()
        kept, size = gauge.level, rounded(output.untyped_storage().nbytes())
        alive = weakref.ref(output.untyped_storage(), lambda _: gauges[0].freed("output", size))  # before the tracker
        root = _Exit.apply(output, gauge.begin, *terms)
        scalar = rounded(root.untyped_storage().nbytes())
        del output, terms, x
        output_saved, input_saved = alive() is not None, begun() is not None
        forward_peak = gauge.take()
        if not first or any(p.requires_grad for p in parameters):
            with torch.autocast("meta", enabled=False):
                root.backward()
        gauge.end()
        base = scalar - (0 if input_saved else entered)
        beside = base + size * output_saved
        peaks = (
            gauge.highest() - base,
            gauge.highest(input=entered) - base,
            gauge.highest(output=size) - beside,
            gauge.highest(input=entered, output=size) - beside,
        )
        gradients = _take_gradients(parameters)
    return PieceCost(
        kept,
        forward_peak,
        *peaks,
        size,
        output_saved,
        input_saved,
        gradients,
        counter.flops,
        counter.traffic,
    )


def measure_objective(
    loss: Callable[[Tensor], Tensor],
    outputs: Tensor,
    objective: nn.Module,
    others: Iterable[Tensor],
    target: AbstractContextManager[Any],
) -> PieceCost:
    """Forward and backward of an objective until the gradient of its module's output is there.

    Args:
        loss: the module's output features -> the weighted loss.
        outputs: the output features, on meta.
        objective: for its parameters and buffers; gradients are removed.
        others: tensors that exist already (the module's input, images, labels).
        target: the emulation of the device.
    """
    parameters = list(objective.parameters())
    with _counting(target, [outputs, *others, *parameters, *objective.buffers()]) as (tracker, counter):
        gauge = _Gauge(tracker)
        value = loss(_Entrance.apply(outputs, _anchor(), gauge.end))
        kept = gauge.level
        gauge.end()
        forward_peak = gauge.highest()
        with torch.autocast("meta", enabled=False):
            value.backward()
        gauge.end()
        del value
        gradients = _take_gradients(parameters)
        peak = gauge.highest()  # its caller holds its input and has no use for an output
    return PieceCost(
        kept, forward_peak, peak, peak, peak, peak, 0, False, False, gradients, counter.flops, counter.traffic
    )


def _take_gradients(parameters: list[nn.Parameter]) -> int:
    size = 0
    for parameter in parameters:
        if parameter.grad is not None:
            size += rounded(parameter.grad.untyped_storage().nbytes())
            parameter.grad = None
    return size


def signature(module: nn.Module) -> object:
    """Return a key that is equal for modules of the same structure, which cost the same at the same input."""
    probabilities = re.compile(r"drop_prob=0*\.?0*[1-9][0-9.e-]*")
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return (
        probabilities.sub("drop_prob=p", repr(module)),
        tuple((name, tuple(t.shape), t.requires_grad) for name, t in tensors),
    )


def interpolated(batch_size: int, samples: Mapping[int, PieceCost]) -> PieceCost:
    """Return a piece's cost at any batch size, interpolated from two or three others (batch size -> cost).

    All bytes are affine in the batch size up to the allocator's rounding, for which two measurements are enough;
    contrastive losses compare all images with each other, which is quadratic and needs three.
    """
    weights = {size: _lagrange(list(samples), size, batch_size) for size in samples}
    values: dict[str, Any] = {}
    for item in fields(PieceCost):
        found = {size: getattr(sample, item.name) for size, sample in samples.items()}
        some = next(iter(found.values()))
        values[item.name] = some if isinstance(some, bool) else sum(weights[size] * v for size, v in found.items())
    return PieceCost(**values)


def _lagrange(points: list[int], point: int, at: int) -> float:
    product = 1.0
    for other in points:
        if other != point:
            product *= (at - other) / (point - other)
    return product

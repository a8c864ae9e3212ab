"""Run blocks in slices of the batch, forward and again in the backward pass, with one slice's graph at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from timm.layers import DropBlock2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from localfeat.efficiency.autocast import AutocastState
from localfeat.utils.errors import UserError


def refuse_slices(block: nn.Module, slices: int) -> None:
    """Refuse a block that does not treat every image independently; random numbers drawn per image are allowed.

    Raises:
        UserError: a module in training mode drops single elements or needs statistics over the batch.
    """
    reason = None
    for module in block.modules():
        if not module.training:
            continue
        if isinstance(module, _BatchNorm):
            reason = "batch normalisation needs the statistics of the whole batch"
        elif (isinstance(module, _DropoutNd) and module.p > 0) or (
            isinstance(module, DropBlock2d) and module.drop_prob
        ):
            reason = "dropout of single elements would differ from that of the whole batch"
    if reason is not None:
        raise UserError(
            f"efficiency.slices={slices}: this backbone cannot be computed in slices of the batch: its {reason}; "
            "use efficiency.recompute=checkpoint with efficiency.slices=1"
        )


def run_sliced(block: nn.Module, x: Tensor, slices: int) -> Tensor:
    """Run a block in slices of the batch, keeping only its input; the backward pass recomputes it slice by slice.

    Args:
        block: module (B, ...) -> (B, ...) that treats every image independently.
        x: (B, ...).
        slices: number of slices; reduced to the number of images if larger.
    """
    refuse_slices(block, slices)
    trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
    run = _SlicedRun(block, list(trained), len(x), min(slices, len(x)), AutocastState.of(x.device))
    return cast(Tensor, _Sliced.apply(x, run, *trained.values()))


@dataclass
class _SlicedRun:
    """The data that the two computations of one block share."""

    block: nn.Module
    names: Sequence[str]  # names of the trained parameters
    images: int
    slices: int
    autocast: AutocastState
    draws: list[Tensor] = field(default_factory=list)  # random numbers of the whole batch, in the order of drawing

    def __post_init__(self) -> None:
        # A cast copy of a weight in autocast's cache would outlive the slice and its graph.
        self.autocast = replace(self.autocast, cache_enabled=False)

    @contextmanager
    def each(self) -> Iterator[Iterator[slice]]:
        """Yield the slices of the batch in turn, with the forward pass's autocast and random numbers."""
        rows = _RowsOfDraws(self.draws, self.images)

        def slices() -> Iterator[slice]:
            for i in range(self.slices):
                rows.start_slice(self.images * i // self.slices, self.images * (i + 1) // self.slices)
                yield rows.slice

        with self.autocast.restored(), rows:
            yield slices()


class _RowsOfDraws(TorchFunctionMode):
    """Mode that draws random numbers, one per image, for the whole batch at once and gives every slice its rows.

    The random generator is thus called as for the whole batch, and ends in the same state.
    """

    def __init__(self, draws: list[Tensor], images: int) -> None:
        super().__init__()
        self._draws = draws
        self._images = images
        self.slice = slice(0, 0)
        self._next = 0

    def start_slice(self, start: int, stop: int) -> None:
        self.slice = slice(start, stop)
        self._next = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.bernoulli_:
            return func(*args, **(kwargs or {}))
        rows: Tensor = args[0]
        if len(rows) != self.slice.stop - self.slice.start:
            raise UserError("efficiency.slices: this backbone draws random numbers that are not one per image")
        if self._next == len(self._draws):
            whole = rows.new_empty((self._images, *rows.shape[1:]))
            self._draws.append(func(whole, *args[1:], **(kwargs or {})))
        drawn = self._draws[self._next]
        self._next += 1
        return rows.copy_(drawn[self.slice])


class _Sliced(torch.autograd.Function):
    """``block(x)`` with the parameters as explicit inputs, so that they get gradients as in any operation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: _SlicedRun, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.run = run
        output: Tensor | None = None
        with run.each() as slices:
            for part in slices:
                result = run.block(x[part])
                if output is None:
                    output = _whole(result, run.images)
                output[part] = result
                del result  # before the next slice begins
        return cast(Tensor, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        run: _SlicedRun = ctx.run
        # Separate leaves on the parameters' memory: gradients are summed in place, and the parameters' hooks run once,
        # on the sum.
        needed = ctx.needs_input_grad[2:]
        leaves = [p.detach().requires_grad_(wanted) for p, wanted in zip(parameters, needed, strict=True)]
        named = dict(zip(run.names, leaves, strict=True))
        x_gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        with run.each() as slices, torch.enable_grad():
            for part in slices:
                rows = x[part].detach().requires_grad_(x_gradient is not None)
                inputs = [leaf for leaf in (rows, *leaves) if leaf.requires_grad]
                torch.autograd.backward(functional_call(run.block, named, (rows,)), gradient[part], inputs=inputs)
                if x_gradient is not None:
                    x_gradient[part] = cast(Tensor, rows.grad)
                del rows, inputs
        return x_gradient, None, *(leaf.grad for leaf in leaves)


def _whole(part: Tensor, images: int) -> Tensor:
    """Return an empty tensor for all images in the memory layout of ``part``, the result of some."""
    channels_last = (
        part.dim() == 4 and not part.is_contiguous() and part.is_contiguous(memory_format=torch.channels_last)
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((images, *part.shape[1:]), dtype=part.dtype, device=part.device, memory_format=layout)

"""A loss that is a mean over images, and its gradient, one slice of the batch at a time on the way forward.

Plain backpropagation keeps the prediction, the target and all of the decoder's activations of the whole batch until
the backward pass. The gradient of a loss needs nothing from above but one factor, so each slice's gradient can be
taken as soon as its loss is known and everything else freed. Liger-Kernel's fused linear cross entropy does the same
for language models (Hsu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from localfeat.errors import UserError
from localfeat.precision import AutocastState, without_autocast

LossOf = Callable[[Tensor, slice], Tensor]
"""``(maps of a slice, the slice) -> loss``, the mean over the slice's images, scalar."""


def sliced_mean(loss_of: LossOf, maps: Tensor, parameters: Iterable[nn.Parameter], slices: int) -> Tensor:
    """``loss_of(maps, slice(None))`` and its gradient, computed in slices of the batch.

    The gradient exists when this returns; the backward pass scales it in place, so it can run only once.

    Args:
        loss_of: calls itself what else a slice needs of the batch. It must treat images independently.
        maps: (B, ...), cut along the first axis. They get a gradient.
        parameters: all that ``loss_of`` uses and that are to get gradients.
        slices: how many, at most B; their sizes differ by one image at most.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    loss, gradients = _loss_and_gradients(loss_of, maps, trained, slices)
    return _Computed.apply(loss, gradients, maps, *trained)


def refuse_batch_statistics(decoder: nn.Module, slices: int) -> None:
    """Raise a :class:`UserError` for a decoder whose output for one image depends on the others'."""
    for module in decoder.modules():
        if isinstance(module, _BatchNorm) or (isinstance(module, _NormBase) and module.track_running_stats):
            raise UserError(
                f"efficiency.loss_slices={slices}: this decoder has a {type(module).__name__}, whose statistics are "
                "the whole batch's: set efficiency.loss_slices=1"
            )


class _Computed(torch.autograd.Function):
    """A loss whose gradients are known already: ``(loss, gradients of inputs, *inputs) -> loss``."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of a loss in slices are gone after the first backward pass")
        return None, None, *(None if known is None else known.mul_(grad) for known in gradients)


def _loss_and_gradients(
    loss_of: LossOf, maps: Tensor, parameters: Sequence[Tensor], slices: int
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and its gradients, first that of ``maps`` (which is made once and written slice by slice)."""
    # Cast copies of weights in autocast's cache would outlive the slice, and belong to a graph that is gone.
    autocast = replace(AutocastState.of(maps.device), cache_enabled=False)
    total = torch.zeros((), device=maps.device)
    of_maps = torch.empty_like(maps, requires_grad=False)
    of_parameters: list[Tensor | None] = [None] * len(parameters)
    for part in _parts(len(maps), slices):
        piece = maps[part].detach().requires_grad_()
        with autocast.restored():
            loss = loss_of(piece, part) * ((part.stop - part.start) / len(maps))
        with without_autocast(maps.device):  # as the whole backward pass
            found = list(torch.autograd.grad(loss, [piece, *parameters], allow_unused=True))
        total += loss.detach()
        del loss, piece  # before the next slice begins
        of_piece = found.pop(0)
        of_maps[part] = 0 if of_piece is None else of_piece
        del of_piece
        of_parameters = [_sum(before, found.pop(0)) for before in of_parameters]
    return total, [of_maps, *of_parameters]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)


def _parts(images: int, slices: int) -> Iterator[slice]:
    count = min(slices, images)
    bounds = [number * images // count for number in range(count + 1)]
    return (slice(start, stop) for start, stop in pairwise(bounds))

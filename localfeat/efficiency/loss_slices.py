"""Pooled features and loss of a local objective, one slice of the batch at a time in the forward pass.

Plain backpropagation keeps the features before and after GELU, the prediction, the target and all of the decoder's
activations of the whole batch until the backward pass, which then makes several gradients of the features' size. But
the gradient of a loss that is a mean over images needs only one factor from above, so each slice's gradient can be
computed as soon as its loss is known, and everything else freed. Only two tensors of the features' size remain: GELU's
input and that gradient, in whose memory the backward pass computes all others. Liger-Kernel's fused linear cross
entropy also computes its gradient in the forward pass, for language models (Hsu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from localfeat.efficiency.autocast import AutocastState, without_autocast
from localfeat.utils.errors import UserError

LossOf = Callable[[Tensor, slice], Tensor]
"""``(maps of a slice, the slice) -> loss``, a scalar, the mean over the slice's images."""


def pooled_and_loss(
    hidden: Tensor, loss_of: LossOf | None, parameters: Iterable[nn.Parameter], slices: int
) -> tuple[Tensor, Tensor | None]:
    """Compute ``maps.mean((2, 3))`` and ``loss_of(maps, slice(None))`` in batch slices, with ``maps = gelu(hidden)``.

    The gradient of the loss exists when this returns. The backward pass can run only once: it computes the gradient of
    ``hidden`` in the memory of that gradient or, without a loss, of ``hidden`` itself, which nothing else may need
    by then (the layer before must not keep its output; linear layers and convolutions do not).

    Args:
        hidden: (B, C, H, W).
        loss_of: function of a slice's maps and the slice, which fetches whatever else it needs of the batch. It must
            treat images independently. ``None`` means no loss.
        parameters: all parameters that ``loss_of`` uses and that shall get gradients.
        slices: number of slices, at most B; their sizes differ by at most one image.

    Returns:
        (B, C), and a scalar or ``None``.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    computed = _forward(hidden, loss_of, trained, slices)
    return cast("tuple[Tensor, Tensor | None]", _Computed.apply(*computed, hidden, *trained))


def refuse_batch_statistics(decoder: nn.Module, slices: int) -> None:
    """Raise a :class:`UserError` for a decoder whose output for one image depends on the other images."""
    for module in decoder.modules():
        if isinstance(module, _BatchNorm) or (isinstance(module, _NormBase) and module.track_running_stats):
            raise UserError(
                f"efficiency.loss_slices={slices}: this decoder has a {type(module).__name__}, which needs the "
                "statistics of the whole batch: set efficiency.loss_slices=1"
            )


class _Computed(torch.autograd.Function):
    """A mean and a loss already computed: ``(pooled, loss, gradients, hidden, *parameters) -> (pooled, loss)``.

    ``gradients`` are those of the loss: for the features after GELU (``None`` without a loss), then for each parameter.
    """

    @staticmethod
    def forward(
        ctx: Any, pooled: Tensor, loss: Tensor | None, gradients: list[Tensor | None], hidden: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(hidden)
        ctx.gradients = gradients
        return pooled.clone(), None if loss is None else loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_pooled: Tensor, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("efficiency.loss_slices: the backward pass runs only once: it uses up the gradients")
        hidden = ctx.saved_tensors[0].detach()
        of_maps, *of_parameters = gradients
        with without_autocast(hidden.device):
            given = (grad_pooled / hidden[0, 0].numel())[:, :, None, None]
            if of_maps is None:
                into, given = hidden, given.expand_as(hidden)
            else:
                into = given = of_maps.mul_(grad_loss).add_(given)
            torch.ops.aten.gelu_backward.grad_input(given, hidden, grad_input=into)  # element by element: in place
        return None, None, None, into, *(None if known is None else known.mul_(grad_loss) for known in of_parameters)


def _forward(
    hidden: Tensor, loss_of: LossOf | None, parameters: Sequence[Tensor], slices: int
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Return the mean over space, the loss and its gradients: first the features', written slice by slice."""
    # Cast copies of weights in autocast's cache would outlive the slice and belong to a graph that is gone.
    autocast = replace(AutocastState.of(hidden.device), cache_enabled=False)
    total: Tensor | None = None
    of_maps: Tensor | None = None
    of_parameters: list[Tensor | None] = [None] * len(parameters)
    pooled = []
    for part in _parts(len(hidden), slices):
        with autocast.restored():
            maps = F.gelu(hidden[part].detach())
            pooled.append(maps.mean((2, 3)))
            if loss_of is None:
                continue
            loss = loss_of(maps.requires_grad_(), part) * ((part.stop - part.start) / len(hidden))
        with without_autocast(hidden.device):  # as the whole backward pass
            found = list(torch.autograd.grad(loss, [maps, *parameters], allow_unused=True))
        total = _sum(total, loss.detach())
        if of_maps is None:
            of_maps = torch.empty_like(hidden, dtype=maps.dtype, requires_grad=False)
        del loss, maps  # before the next slice begins
        of_piece = found.pop(0)
        of_maps[part] = 0 if of_piece is None else of_piece
        del of_piece
        of_parameters = [_sum(before, found.pop(0)) for before in of_parameters]
    return torch.cat(pooled), total, [of_maps, *of_parameters]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)


def _parts(images: int, slices: int) -> Iterator[slice]:
    count = min(slices, images)
    bounds = [number * images // count for number in range(count + 1)]
    return (slice(start, stop) for start, stop in pairwise(bounds))

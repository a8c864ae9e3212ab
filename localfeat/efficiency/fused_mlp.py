"""The second half of an MLP, activation and linear layer, as one operation with a lean backward pass.

Plain backpropagation through ``fc2(gelu(h))`` holds three tensors of the hidden width at once, besides the gradients of
the weights: h, the gradient of the activation and the gradient of h; before that, the activation itself. Here the
gradient of h is computed slice by slice (over tokens) in the memory of a saved tensor that is no longer needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from localfeat.efficiency.autocast import AutocastState, without_autocast

MOST_SLICES = 8
SMALLEST_SLICE = 2**20
"""Elements of the hidden layer below which further slicing saves no memory worth a kernel launch."""

APPROXIMATIONS = {timm.layers.GELU: "none", timm.layers.GELUTanh: "tanh"}
"""The approximation of timm's activations; ``torch.nn.GELU`` has it as an attribute."""

_keeps_activation: ContextVar[bool] = ContextVar("keeps_activation", default=True)


@contextmanager
def activations_computed_again() -> Iterator[None]:
    """Let fused MLPs in this context drop their activation: the backward pass recomputes it."""
    token = _keeps_activation.set(False)
    try:
        yield
    finally:
        _keeps_activation.reset(token)


def fuse_mlps(model: nn.Module) -> None:
    """Let the second half of every plain timm MLP run as one operation.

    A plain MLP is a ``timm.layers.Mlp`` itself with linear layers (no 1x1 convolutions), GELU between them, and neither
    norm nor dropout. All others (gated MLPs, subclasses, MLPs with global response normalisation or dropout) stay as
    they are: fusing only saves memory, and that is predicted and measured.

    Only the class of the modules changes: parameters, state-dict keys, copies and pickles are as before.
    """
    for module in model.modules():
        if is_plain(module):
            module.__class__ = FusedMlp


def is_plain(module: nn.Module) -> bool:
    """Return whether ``module`` is an MLP that :class:`FusedMlp` can replace."""
    return (
        type(module) is Mlp
        and type(module.fc1) is nn.Linear
        and type(module.fc2) is nn.Linear
        and type(module.act) in (nn.GELU, *APPROXIMATIONS)
        and type(module.norm) is nn.Identity
        and not any(drop.p > 0 for drop in (module.drop1, module.drop2))
    )


class FusedMlp(Mlp):
    """timm's ``Mlp`` with activation and second linear layer as one operation.

    Forward hooks on those two submodules run only where no graph is built. The backward pass may overwrite the output
    of ``fc1`` that a hook has kept.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        if not torch.is_grad_enabled():
            return cast(Tensor, super().forward(x))
        h = self.fc1(x)
        # Cast explicitly, so that the parameters' gradients have the parameters' dtype.
        weight, bias = (_cast(parameter, h.device) for parameter in (self.fc2.weight, self.fc2.bias))
        keeps = _keeps_activation.get()
        return cast(Tensor, _ActivationAndLinear.apply(h, weight, bias, self._approximate, keeps))

    @property
    def _approximate(self) -> str:
        return APPROXIMATIONS.get(type(self.act)) or cast(str, self.act.approximate)


def _cast(parameter: Tensor | None, device: torch.device) -> Tensor | None:
    """Cast a parameter as autocast would for a linear layer."""
    autocast = AutocastState.of(device)
    if parameter is None or not autocast.enabled or parameter.dtype == torch.float64:
        return parameter
    return parameter.to(autocast.dtype)


class _ActivationAndLinear(torch.autograd.Function):
    """``gelu(h) @ weight.T + bias``; the backward pass can run only once.

    The gradient of h overwrites the saved activation, or h itself if the activation was not saved. That is safe, as h
    is the output of a linear layer, which does not keep it.

    Args of ``apply``:
        h: (..., H).
        weight: (C, H).
        bias: (C,) or ``None``.
        approximate: argument of :func:`torch.nn.functional.gelu`.
        keeps: whether to save the activation if the gradient of the weight needs it.

    Returns (..., C).
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, keeps: bool) -> Tensor:
        activation = F.gelu(h, approximate=approximate)
        output = F.linear(activation, weight, bias)
        ctx.save_for_backward(h, activation if keeps and ctx.needs_input_grad[1] else None, weight)
        ctx.approximate, ctx.spent = approximate, False
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("efficiency.fused_mlp: the backward pass runs only once: it overwrites saved tensors")
        ctx.spent = True
        h, activation, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        given = grad.reshape(-1, grad.shape[-1])
        hidden = h.detach().reshape(-1, h.shape[-1])
        with without_autocast(h.device):
            grad_bias = given.sum(0) if wanted[2] else None
            if activation is None:
                grad_weight = _over_slices(given, hidden, ctx.approximate) if wanted[1] else None
                into = hidden
            else:
                into = activation.reshape(hidden.shape)
                grad_weight = given.mT @ into
            if wanted[0]:
                for part in _slices(hidden):
                    _gelu_backward(given[part] @ weight, hidden[part], ctx.approximate, into[part])
        return into.view(h.shape) if wanted[0] else None, grad_weight, grad_bias, None, None


def _over_slices(given: Tensor, hidden: Tensor, approximate: str) -> Tensor:
    """Return the gradient of the weight (C, H) from recomputed activations, summed in at least float32."""
    precise = torch.promote_types(given.dtype, torch.float32)
    total = given.new_zeros((given.shape[1], hidden.shape[1]), dtype=precise)
    for part in _slices(hidden):
        total += given[part].mT @ F.gelu(hidden[part], approximate=approximate)
    return total.to(given.dtype)


def _gelu_backward(grad: Tensor, hidden: Tensor, approximate: str, into: Tensor) -> None:
    """Write the gradient of GELU's input into ``into``, which may be ``hidden`` itself."""
    torch.ops.aten.gelu_backward.grad_input(grad, hidden, approximate=approximate, grad_input=into)


def _slices(hidden: Tensor) -> Iterator[slice]:
    """Divide the rows of (rows, H) into ranges."""
    rows, width = hidden.shape
    step = -(-rows // min(MOST_SLICES, max(1, rows * width // SMALLEST_SLICE)))
    return (slice(start, start + step) for start in range(0, rows, step or 1))

"""Windowed attention as one operation that keeps queries, keys and values but no attention matrix.

The backward pass recomputes the probabilities from queries and keys, as FlashAttention does (Dao et al., 2022,
section 3.1 and appendix B). Windows are small (49 or 64 tokens) and need no tiling: both passes go through the batch
in slices of whole windows, and only one slice's N x N matrices exist at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import WindowAttention as WindowAttentionV1
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from localfeat.utils.errors import UserError

MOST_SLICES = 8
SMALLEST_SLICE = 2**20
"""Elements of N x N matrices below which further slicing saves no memory worth a kernel launch."""

MIN_LENGTH = 1e-12
"""Lower limit of the length by which cosine attention divides vectors, as in ``torch.nn.functional.normalize``."""


def fuse_window_attention(model: nn.Module) -> None:
    """Let every windowed attention of a Swin or SwinV2 run as one operation; other models stay as they are.

    Only the class of the attention modules changes: parameters, state-dict keys, copies and pickles are as before.

    Raises:
        UserError: the model uses attention dropout, which needs the attention matrix.
    """
    if not isinstance(model, SwinTransformer | SwinTransformerV2):
        return
    found = [module for module in model.modules() if isinstance(module, WindowAttentionV1 | WindowAttentionV2)]
    dropout = max((module.attn_drop.p for module in found), default=0.0)
    if dropout > 0:
        raise UserError(
            f"efficiency.fused_attention=true needs a backbone with attn_drop_rate 0, and this one has {dropout}"
        )
    for module in found:
        module.__class__ = FusedWindowAttention if isinstance(module, WindowAttentionV1) else FusedCosineWindowAttention


class FusedWindowAttention(WindowAttentionV1):
    """timm's ``WindowAttention`` of Swin with its attention as one operation."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (windows, N, C) to (windows, N, C); ``mask`` (windows per image, N, N) is added to the scores."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        x = _WindowAttention.apply(qkv, self.scale, self._get_rel_pos_bias()[0], mask).flatten(2)
        return self.proj_drop(self.proj(x))


class FusedCosineWindowAttention(WindowAttentionV2):
    """timm's ``WindowAttention`` of SwinV2 with its attention as one operation."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (windows, N, C) to (windows, N, C); ``mask`` (windows per image, N, N) is added to the scores."""
        qkv = self._qkv(x).unflatten(-1, (3, self.num_heads, -1))
        scale = self.logit_scale.clamp(max=math.log(100)).exp()
        x = _WindowAttention.apply(qkv, scale, self._position_bias(), mask).flatten(2)
        return self.proj_drop(self.proj(x))

    def _qkv(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))  # type: ignore[arg-type]
        if not self.qkv_bias_separate:
            return F.linear(x, self.qkv.weight, bias)
        qkv = self.qkv(x)
        qkv += bias  # in place, so that it keeps autocast's dtype
        return qkv

    def _position_bias(self) -> Tensor:
        """Return the continuous relative position bias (h, N, N): 16 sigmoid(MLP(log-spaced coordinates))."""
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        index = self.get_buffer("relative_position_index")
        bias = table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1).contiguous()
        return 16 * bias.sigmoid()


class _WindowAttention(torch.autograd.Function):
    """softmax(scale q kᵀ + bias + mask) v, softmax in float32, matrix products in the dtype of ``qkv``.

    Args of ``apply``:
        qkv: (W, N, 3, h, d), W windows of N tokens, packed so that the gradient is one tensor too.
        scale: a number, or (h, 1, 1) for cosine attention (SwinV2), which first scales queries and keys to length 1.
        bias: (h, N, N), the same for all windows.
        mask: (windows per image, N, N) or ``None``. The windows of one image are consecutive.

    Returns (W, N, h, d).
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float | Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        out = qkv.new_empty(qkv.shape[:2] + qkv.shape[3:])
        for part in _slices(qkv, mask):
            q, k, v = _operands(qkv[part], scale)
            probabilities = _probabilities(q, k, bias, mask).to(v.dtype)
            del q, k
            out[part].transpose(1, 2).copy_(probabilities @ v)
            del probabilities
        tensors, ctx.scale = ([scale], None) if isinstance(scale, Tensor) else ([], scale)
        ctx.save_for_backward(qkv, bias, mask, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, mask, *tensors = ctx.saved_tensors
        scale = tensors[0] if tensors else ctx.scale
        grad_qkv = torch.empty_like(qkv)
        grad_bias = torch.zeros_like(bias, dtype=_precise(bias.dtype))
        grad_scale = torch.zeros_like(scale, dtype=_precise(scale.dtype)) if tensors else None
        for part in _slices(qkv, mask):
            q, k, v = _operands(qkv[part], scale)
            given = grad[part].transpose(1, 2).contiguous()
            probabilities = _probabilities(q, k, bias, mask)
            into = grad_qkv[part].permute(2, 0, 3, 1, 4)
            into[2].copy_(probabilities.to(v.dtype).mT @ given)
            grad_scores = (given @ v.mT).to(probabilities.dtype)
            del v, given
            grad_scores = _softmax_backward_(grad_scores, probabilities)
            del probabilities
            grad_bias += grad_scores.sum(0)
            grad_scores = grad_scores.to(q.dtype)
            grad_q, grad_k = grad_scores @ k, grad_scores.mT @ q
            del grad_scores, q, k
            if grad_scale is None:
                torch.mul(grad_q, scale, out=into[0])
                into[1].copy_(grad_k)
            else:
                grad_scale += _cosine_backward(qkv[part], scale, grad_q, grad_k, into)
        return grad_qkv, grad_scale, grad_bias.to(bias.dtype), None


def _slices(qkv: Tensor, mask: Tensor | None) -> Iterator[slice]:
    """Divide the windows into ranges (of whole images if there is a mask) with temporaries small beside ``qkv``."""
    windows, tokens, _, heads, _ = qkv.shape
    count = min(MOST_SLICES, max(1, windows * heads * tokens**2 // SMALLEST_SLICE))
    image = 1 if mask is None else len(mask)
    step = -(-windows // (count * image)) * image
    return (slice(start, start + step) for start in range(0, windows, step))


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _operands(qkv: Tensor, scale: float | Tensor) -> tuple[Tensor, ...]:
    """Return scaled queries, keys and values, contiguous (W, h, N, d) each, of (W, N, 3, h, d)."""
    packed = qkv.permute(2, 0, 3, 1, 4).clone(memory_format=torch.contiguous_format)
    if isinstance(scale, Tensor):
        unit, _ = _to_unit_length(packed[:2])
        unit[0] *= scale
        packed[:2] = unit
    else:
        packed[0] *= scale
    return packed.unbind(0)


def _to_unit_length(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale vectors (..., d) to length 1; return them and their former lengths (..., 1)."""
    x = x.to(_precise(x.dtype))
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=MIN_LENGTH)
    return x / length, length


def _probabilities(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax(q kᵀ + bias + mask), (W, h, N, N) in at least float32, for q, k (W, h, N, d)."""
    scores = (q @ k.mT).to(_precise(q.dtype))
    scores += bias
    if mask is not None:
        by_image = scores.unflatten(0, (-1, len(mask)))
        by_image += mask[:, None]
    return scores.softmax(-1)


def _softmax_backward_(grad: Tensor, probabilities: Tensor) -> Tensor:
    """Return the gradient of the scores, P (dP - sum(P dP)), computed in place of ``grad`` dP."""
    grad *= probabilities
    return grad.addcmul_(probabilities, grad.sum(-1, keepdim=True), value=-1)


def _cosine_backward(qkv: Tensor, scale: Tensor, grad_q: Tensor, grad_k: Tensor, into: Tensor) -> Tensor:
    """Write the gradients of raw queries and keys into ``into`` (3, W, h, N, d); return the scale's (h, 1, 1)."""
    packed = qkv.permute(2, 0, 3, 1, 4)
    units, lengths = _to_unit_length(packed[:2])
    grad_unit_q = grad_q.to(units.dtype)
    grad_scale = (grad_unit_q * units[0]).sum((0, 2, 3)).view_as(scale)
    for index, given in enumerate((grad_unit_q * scale, grad_k.to(units.dtype))):
        unit = units[index]
        along = (given * unit).sum(-1, keepdim=True)
        into[index].copy_(given.addcmul_(unit, along, value=-1).div_(lengths[index]))
    return grad_scale

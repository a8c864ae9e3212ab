"""Scaled dot-product attention on the meta device with the kernel that another device would choose.

The meta device always computes it by matrix multiplications and keeps the attention matrix. CUDA and the CPU have
fused kernels with meta kernels of their own, so that shapes, saved tensors and gradients come out as there. The choice
follows ``aten/src/ATen/native/transformers/sdp_utils_cpp.cpp``, ``cuda/sdp_utils.cpp`` and ``attention.cpp``.
On GPUs of the Hopper and Blackwell generation recent versions of PyTorch take cuDNN's kernel first, which keeps the
same tensors as the flash kernel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_FLASH_HEAD = 256
_HALF = (torch.bfloat16, torch.float16)


def attend(
    target: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute ``F.scaled_dot_product_attention`` as on ``target`` (``cuda`` or ``cpu``)."""
    choose = _cuda_kernel if target == "cuda" else _cpu_kernel
    kernel = "math" if enable_gqa else choose(query, key, value, attn_mask, dropout_p)
    if kernel == "math":
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    mask = _additive(attn_mask, query.dtype)
    if kernel == "cpu_flash":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
        )[0]
    if kernel == "flash":
        return _flash(query, key, value, dropout_p, is_causal, scale)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if mask is not None:
        mask = _aligned(mask).expand(*query.shape[:2], query.shape[2], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, needs_grad, dropout_p, is_causal, scale=scale
    )[0]


def _cuda_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> str:
    tensors = (query, key, value)
    if query.dim() != 4 or any(t.stride(-1) != 1 for t in tensors):
        return "math"
    same_head = query.shape[-1] == key.shape[-1] == value.shape[-1]
    if mask is None and query.dtype in _HALF and same_head and query.shape[-1] <= LARGEST_FLASH_HEAD:
        return "flash"
    alignment = 8 if query.dtype in _HALF else 4  # tensor cores, compute capability 8.0 or above
    aligned = all(t.shape[-1] % alignment == 0 for t in tensors)
    single = query.dtype == torch.float32 or query.dtype in _HALF
    return "efficient" if aligned and single and query.shape[-1] == key.shape[-1] else "math"


def _cpu_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> str:
    tensors = (query, key, value)
    fits = (
        dropout == 0
        and query.dim() == 4
        and all(t.stride(-1) == 1 for t in tensors)
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and (mask is None or _mask_fits(mask, query, key))
    )
    return "cpu_flash" if fits else "math"


def _mask_fits(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Tell whether the CPU's kernel takes the mask: without gradient, with two or four dimensions."""
    wanted = (*query.shape[:2], query.shape[2], key.shape[2])
    if mask.requires_grad or mask.dim() not in (2, 4):
        return False
    return all(size in (1, full) for size, full in zip(mask.shape[::-1], wanted[::-1], strict=False))


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Turn a boolean mask into zeros and minus infinity, as ``convert_boolean_attn_mask`` does."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.scalar_tensor(-math.inf, dtype=dtype, device=mask.device))


def _aligned(mask: Tensor) -> Tensor:
    """Align rows to 8 elements, as the memory-efficient kernel needs (``preprocess_mask``)."""
    if mask.stride(-1) == 1 and all(stride % 8 == 0 for stride in mask.stride()[:-1]):
        return mask
    length = mask.shape[-1]
    return F.pad(mask, (0, 8 - length % 8))[..., :length]


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> Tensor:
    """Run the flash kernel, with heads padded to a width that is a multiple of 8."""
    width = query.shape[-1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    padding = -width % 8
    if padding:
        query, key, value = (F.pad(t, (0, padding)) for t in (query, key, value))
    out = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]
    return out[..., :width] if padding else out

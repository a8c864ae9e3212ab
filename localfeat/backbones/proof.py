"""Proofs that the parts of a decomposition compute what the whole network computes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

EVALUATED, TRAINED = 5, 8
"""Images of the batches that are compared: more than those that a forward pass is recorded with."""


def differences(
    model: nn.Module, pieces: nn.Module, image: tuple[int, int, int], *, trains: bool = True
) -> Iterator[str]:
    """Yield in what the parts differ from the model: outputs, gradients of parameters and images, buffers.

    Buffers are left as they were, the mode is not.

    Args:
        model: a network that may be changed by running it.
        pieces: its parts.
        image: channels, height and width.
        trains: whether to compare steps of training, too.
    """
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def compared(batch: int, context: Callable[[], AbstractContextManager[Any]]) -> list[str]:
        images = some_images(model, image, batch)
        found = []
        for function in (model, pieces):
            for name, buffer in model.named_buffers():
                buffer.data.copy_(state[name])
            with context():
                found.append(_computed(function, model, images))
        whole, parts = found
        return [what for what in {**whole, **parts} if not same(whole.get(what), parts.get(what))]

    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        both = nn.ModuleList([model, pieces]).eval()
        yield from (f"{what} in evaluation" for what in compared(EVALUATED, nullcontext))
        if "output" in compared(1, _autocast(model)):  # gradients differ by the order of casts
            yield "output under autocast"
        if trains:
            both.train()
            yield from (f"{what} in training" for what in compared(TRAINED, nullcontext))
    for name, buffer in model.named_buffers():
        buffer.data.copy_(state[name])


def some_images(model: nn.Module, image: tuple[int, int, int], batch: int) -> Tensor:
    """Return random images (B, C, H, W) of the model's type, on its device."""
    some = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *image, generator=generator).to(some.device, some.dtype)


def same(one: Any, other: Any) -> bool:
    """Return whether two results are equal, on a CPU bit for bit: tensors, errors, or dicts of them."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        if one.device.type == "cpu" or not one.is_floating_point():
            return torch.equal(one.nan_to_num(), other.nan_to_num())
        scale = float(other.abs().max()) if other.numel() else 0.0  # other devices add in any order
        return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)
    return type(one) is type(other) and bool(one == other)


def _autocast(model: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: torch.autocast(next(model.parameters()).device.type, torch.bfloat16)


def _computed(function: nn.Module, model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Return output, gradients and buffers after one step, or the error of a network that takes no such batch."""
    torch.manual_seed(1)
    images = images.clone().requires_grad_()
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        logits = function(images.clone())
        loss = logits.float().square().mean()
        gradients = torch.autograd.grad(loss, [images, *wanted.values()], allow_unused=True)
    except (RuntimeError, ValueError) as error:
        return {"the error": type(error)}
    return {
        "output": logits.detach(),
        "gradient": dict(zip(["images", *wanted], gradients, strict=True)),
        "buffer": {name: buffer.clone() for name, buffer in model.named_buffers()},
    }

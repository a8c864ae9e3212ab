"""The work of a step: FLOPs of the heavy operations and bytes moved by all operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class WorkCounter(TorchDispatchMode):
    """Count the work of all operations while it is active, on any device, meta included.

    Attributes:
        flops: FLOPs of products, convolutions and attention kernels (two per multiply-add), by torch's own formulas.
        traffic: bytes of all inputs and outputs of operations that compute or copy (not of views).
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.traffic = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", None)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        if not getattr(func, "is_view", False):
            self.traffic += sum(_bytes(leaf) for leaf in tree_leaves([args, result]) if isinstance(leaf, Tensor))
        return result


def _bytes(tensor: Tensor) -> int:
    """Return the bytes that an operation touches; an expanded tensor counts only its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())

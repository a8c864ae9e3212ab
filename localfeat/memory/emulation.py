"""The meta device behaving like another one: autocast, attention kernels, optimizers.

The meta device has shapes and dtypes but no data. By itself it has no autocast, takes no fused attention kernel and
no fused optimizer, so that the memory it predicts is that of no real device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from types import FunctionType
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from localfeat.efficiency import autocast as precision_state
from localfeat.memory.attention_kernels import attend
from localfeat.memory.autocast_lists import policies

Target = Literal["cuda", "cpu"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
AUTOCAST_DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_AVERAGED = ("mse_loss", "smooth_l1_loss")


class Emulation(TorchFunctionMode):
    """Compute meta tensors, while active, as ``target`` would compute real ones.

    - Autocast as in Lightning's ``precision``: on from the entry, cast copies of weights made anew at each use.
      ``torch.autocast("meta", enabled=False)`` and :class:`~localfeat.efficiency.autocast.AutocastState` work.
    - Losses that average errors with those in memory.
    - Scaled dot-product attention by the kernel that ``target`` would choose.
    - Backward passes under the same rules, so that recomputation in them is seen too.
    - Optimizers of ``torch.optim`` with ``fused=True`` can be built and stepped.

    The operations autocast knows are those of :mod:`localfeat.memory.autocast_lists`. It changes global state of torch
    until it is left, so no real training should run at the same time; tensors on other devices are left alone, apart
    from the CPU's autocast switch, which serves the meta device.

    Args:
        target: ``cuda`` or ``cpu``.
        precision: Lightning's name, one of ``32-true``, ``bf16-mixed`` and ``16-mixed``.
    """

    def __init__(self, target: Target, precision: Precision) -> None:
        super().__init__()
        self.target = target
        self.dtype = AUTOCAST_DTYPES[precision]
        self._policies = policies(target)
        self._running: list[Callable[..., Any]] = []
        self._bodies = _Bodies()
        self._patches = ExitStack()
        self._depth = 0

    def __enter__(self) -> Emulation:
        if self._depth == 0:
            self._patch_torch()
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._depth -= 1
        if self._depth == 0:
            precision_state._emulations.remove(self)
            self._patches.close()

    def _patch_torch(self) -> None:
        precision_state._emulations.append(self)
        enter = self._patches.enter_context
        enter(patch.object(torch.autocast, "__init__", _autocast_init(torch.autocast.__init__)))
        enter(torch.autocast("meta", self.dtype or torch.bfloat16, self.dtype is not None, cache_enabled=False))
        for devices in ("_get_fused_kernels_supported_devices", "_get_foreach_kernels_supported_devices"):
            for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
                module = import_module(name)
                enter(patch.object(module, devices, _with_meta(getattr(module, devices))))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, FunctionType):
            return self._run_python(func, args, kwargs)
        name = func.__name__
        policy = self._policies.get(name)
        if policy is not None and torch.is_autocast_enabled(precision_state.EMULATED_BY):
            args, kwargs = self._cast(policy, args, kwargs)
        if name == "scaled_dot_product_attention" and args and args[0].device.type == "meta":
            return attend(self.target, *args, **kwargs)
        if name in _AVERAGED and args[0].device.type == "meta":
            errors = torch.empty_like(args[0])  # real kernels average them, the meta device's have none
            loss = func(*args, **kwargs)
            del errors
            return loss
        return func(*args, **kwargs)

    def _run_python(self, func: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Functions written in Python (F.softmax, Tensor.backward): what they call is intercepted in its turn."""
        if func in self._running:  # it came back: its own check for function modes was not found
            return func(*args, **kwargs)
        self._running.append(func)
        try:
            with self:
                return self._bodies[func](*args, **kwargs)
        finally:
            self._running.pop()

    def _cast(
        self, policy: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        lower = torch.get_autocast_dtype(precision_state.EMULATED_BY)
        if policy == "fp32_output":
            asked = kwargs.get("dtype") is not None or any(isinstance(arg, torch.dtype) for arg in args)
            first = args[0] if args else kwargs.get("input")
            return args, kwargs if asked or not _is_eligible(first) else {**kwargs, "dtype": torch.float32}
        dtype = torch.float32 if policy == "fp32" else lower
        if policy == "promote" and torch.float32 in _dtypes((args, kwargs)):
            dtype = torch.float32
        return _to(args, dtype), _to(kwargs, dtype)


def _is_eligible(value: Any) -> bool:
    """Tell whether autocast casts a value, as ``is_eligible`` in autocast_mode.h: floating point, not double."""
    return (
        isinstance(value, Tensor)
        and value.device.type == "meta"
        and value.is_floating_point()
        and value.dtype != torch.float64
    )


def _to(value: Any, dtype: torch.dtype) -> Any:
    """Cast from the last argument to the first, the order of torch's compiled wrappers."""
    if isinstance(value, (tuple, list)):
        return type(value)([_to(item, dtype) for item in reversed(value)][::-1])
    if isinstance(value, dict):
        return {key: _to(item, dtype) for key, item in value.items()}
    return value.to(dtype) if _is_eligible(value) else value


def _dtypes(value: Any) -> set[torch.dtype]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return set().union(*(_dtypes(item) for item in value))
    return {value.dtype} if _is_eligible(value) else set()


def _autocast_init(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, precision_state.EMULATED_BY if device_type == "meta" else device_type, *args, **kwargs)

    return init


def _with_meta(devices: Callable[[], list[str]]) -> Callable[[], list[str]]:
    return lambda: [*devices(), "meta"]


_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


class _Bodies(dict[FunctionType, FunctionType]):
    """``{function: the same}`` without the hook by which torch hands it to function modes first."""

    def __init__(self) -> None:
        super().__init__()
        self._globals: dict[int, dict[str, Any]] = {}

    def __missing__(self, func: FunctionType) -> FunctionType:
        names = self._globals.setdefault(
            id(func.__globals__), {**func.__globals__, **dict.fromkeys(_CHECKS, lambda *_: False)}
        )
        body = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        body.__kwdefaults__ = func.__kwdefaults__
        self[func] = body
        return body

"""Run blocks that keep the results of heavy operations and recompute those of cheap ones, one by one, when needed.

Torch's selective checkpointing recomputes a whole block before its backward pass begins, so that everything is alive at
once. Here every saved tensor that cheap operations can compute from others is replaced by a recipe, which runs when the
backward pass asks for this tensor. No graph is built twice, nothing random is repeated (its results are saved), and
autocast needs no care, as recipes consist of the operations below it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

CHEAP = frozenset(
    {
        aten.native_layer_norm.default,
        aten.native_group_norm.default,
        aten.gelu.default,
        aten.relu.default,
        aten.silu.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.exp.default,
        aten._softmax.default,
        aten._to_copy.default,
        aten.clone.default,
        aten.roll.default,
        aten.constant_pad_nd.default,
        aten.index.Tensor,
        aten.cat.default,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.linalg_vector_norm.default,
    }
)
"""Operations that compute little for the memory they move; their first result can be recomputed."""

BATCH_NORMS = frozenset(
    {aten.native_batch_norm.default, aten._batch_norm_with_update.default, aten.cudnn_batch_norm.default}
)
"""Also cheap; arguments 3 and 4 are the running statistics, which they update."""

PRODUCTS = frozenset({aten.bmm.default})
"""Cheap if the result is larger than both factors, as attention scores are."""

OPERATIONS = CHEAP | BATCH_NORMS | PRODUCTS

IN_PLACE = {aten.relu_.default: aten.relu.default}
"""Cheap operations that overwrite their input, and the operation that recomputes their result."""


def run_selectively(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block whose graph keeps recipes in place of the tensors that cheap operations can recompute."""
    recorder = _Recorder([x, *block.parameters(), *block.buffers()])
    with recorder, saved_tensors_hooks(recorder.pack, _unpack):
        output = block(x)
    recorder.forget()
    return cast(Tensor, output)


class _Recipe:
    """A recipe to recompute the first result of an operation. Alive as long as a saved tensor needs it."""

    __slots__ = ("args", "device_type", "dtype", "func", "kwargs", "strides", "users", "value")

    def __init__(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.strides = result.stride()
        self.dtype = result.dtype
        self.device_type = result.device.type
        self.users = 0  # saved tensors on this result that the backward pass has not asked for yet
        self.value: Tensor | None = None  # kept while there are users

    def make(self) -> Tensor:
        """Return the result in its original memory layout."""
        if self.value is not None:
            return self.value
        result = self.func(*(_made(a) for a in self.args), **self.kwargs)
        result = result[0] if isinstance(result, tuple) else result
        if result.stride() != self.strides:
            raise RuntimeError(f"{self.func} gave another memory layout when it was computed again")
        if self.users > 0:
            self.value = result
        return cast(Tensor, result)

    def inputs(self) -> list[_Kept]:
        """Return the tensors that the recipe starts from."""
        found: list[_Kept] = []
        for argument in _flat(self.args):
            if isinstance(argument, _Kept):
                found.append(argument)
            elif isinstance(argument, _View):
                found += argument.recipe.inputs()
        return found


class _Kept:
    """A tensor kept as it is, with a check that it has not been overwritten since."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version

    @property
    def is_intact(self) -> bool:
        return self.tensor._version == self.version

    def make(self) -> Tensor:
        if not self.is_intact:
            raise RuntimeError("a tensor needed for gradient computation has been modified by an in-place operation")
        return self.tensor


class _View:
    """A view of a recipe's result."""

    __slots__ = ("geometry", "recipe")

    def __init__(self, recipe: _Recipe, tensor: Tensor) -> None:
        self.recipe = recipe
        self.geometry = tensor.shape, tensor.stride(), tensor.storage_offset()

    def make(self) -> Tensor:
        return self.recipe.make().as_strided(*self.geometry)

    def take(self) -> Tensor:
        """Return the view for one of the recipe's users, and discharge this user."""
        tensor = self.make()
        self.recipe.users -= 1
        if self.recipe.users <= 0:
            self.recipe.value = None
        return tensor


class _Scratch:
    """A tensor that the operation writes into, or ``None``; a recomputation writes into a copy."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor

    def make(self) -> Tensor | None:
        return None if self.tensor is None else self.tensor.clone()


_Saved = _Kept | _View


def _made(argument: Any) -> Any:
    if isinstance(argument, (_Kept, _View, _Scratch)):
        return argument.make()
    return [_made(item) for item in argument] if isinstance(argument, list) else argument


def _flat(arguments: Sequence[Any]) -> list[Any]:
    return [item for a in arguments for item in (a if isinstance(a, list) else (a,))]


def _unpack(saved: _Saved) -> Tensor:
    """Return the saved tensor that the backward pass asks for."""
    if isinstance(saved, _Kept):
        return saved.make()
    if torch.is_grad_enabled():
        raise RuntimeError("efficiency.recompute=selective has no second derivatives")
    kind = saved.recipe.device_type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # the recipe has the casts of the forward pass
        with torch.autocast(kind, enabled=False):
            return saved.take()
    return saved.take()


class _Recorder(TorchDispatchMode):
    """Records a recipe for every storage that a cheap operation makes, and decides which tensors are saved.

    Args:
        alive: tensors that stay alive whatever is saved.
    """

    def __init__(self, alive: Sequence[Tensor]) -> None:
        super().__init__()
        self._recipes: dict[int, tuple[weakref.ref[Any], _Recipe]] = {}  # by storage
        self._kept = {t.untyped_storage()._cdata for t in alive}

    def forget(self) -> None:
        """Drop all recipes but those that saved tensors hold."""
        self._recipes.clear()

    def pack(self, tensor: Tensor) -> _Saved:
        """Return the recipe if it keeps fewer bytes alive than the tensor, else the tensor."""
        recipe = self._recipe(tensor)
        if recipe is None:
            return self._keep(tensor)
        inputs = {kept.tensor.untyped_storage()._cdata: kept for kept in recipe.inputs()}
        new = [kept.tensor for key, kept in inputs.items() if key not in self._kept]
        storage = tensor.untyped_storage()
        if sum(t.untyped_storage().nbytes() for t in new) >= storage.nbytes() or not all(
            kept.is_intact for kept in inputs.values()
        ):
            del self._recipes[storage._cdata]
            return self._keep(tensor)
        self._kept.update(inputs)
        recipe.users += 1
        return _View(recipe, tensor)

    def _keep(self, tensor: Tensor) -> _Kept:
        self._kept.add(tensor.untyped_storage()._cdata)
        return _Kept(tensor)

    def _recipe(self, tensor: Tensor) -> _Recipe | None:
        _, recipe = self._recipes.get(tensor.untyped_storage()._cdata, (None, None))
        return recipe if recipe is not None and recipe.dtype == tensor.dtype else None

    def _note(self, result: Tensor, recipe: _Recipe) -> None:
        storage = result.untyped_storage()
        key = storage._cdata
        recipes = self._recipes
        recipes[key] = weakref.ref(storage, lambda _: recipes.pop(key, None)), recipe

    def _operand(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            recipe = self._recipe(value)
            return _Kept(value) if recipe is None else _View(recipe, value)
        return [self._operand(item) for item in value] if isinstance(value, (list, tuple)) else value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        again = func if func in OPERATIONS else IN_PLACE.get(func)
        if again is None or isinstance(args[0], nn.Parameter):  # autocast's cache keeps cast weights anyway
            result = func(*args, **kwargs)
            if func._schema.is_mutable:
                for tensor in _overwritten(func, args, kwargs):
                    self._recipes.pop(tensor.untyped_storage()._cdata, None)
            return result
        operands = [self._operand(value) for value in args]
        if func in BATCH_NORMS:
            operands[3:5] = [_Scratch(value) for value in args[3:5]]
        result = func(*args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        if again is not func and not isinstance(operands[0], _View):
            return result
        if func not in PRODUCTS or first.numel() > max(args[0].numel(), args[1].numel()):
            self._note(first, _Recipe(again, operands, kwargs, first))
        return result


def _overwritten(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments that the operation writes into."""
    values = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(func._schema.arguments)]
    return [v for a, v in values if a.alias_info is not None and a.alias_info.is_write and isinstance(v, Tensor)]

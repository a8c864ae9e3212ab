"""The skeleton of a forward pass as a list of steps: calls of whole modules, and torch functions between them.

A network runs on images without data (meta device), so that Python's own control flow needs no tracing. Which modules
are followed and which are called whole is the caller's choice. The pass runs for batches of two and of three images:
numbers that grow with the batch are told from constants by that.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from localfeat.backbones.bare import without_data

BATCHES = (2, 3)


class Untraceable(Exception):
    """Why the steps of a forward pass cannot be told, in one line."""


class Result(NamedTuple):
    """A tensor that a step returns: the whole of what it returns, or the item at ``path``."""

    step: int
    path: tuple[Any, ...] = ()


class Member(NamedTuple):
    """A parameter or buffer of the network."""

    name: str


class Batch(NamedTuple):
    """The number of images, times a constant."""

    times: int


class Device(NamedTuple):
    """The device of the images."""


class Dtype(NamedTuple):
    """The type of the features so far, which autocast changes."""


@dataclass(frozen=True)
class Step:
    """One call. In its arguments :class:`Result`, :class:`Member`, :class:`Batch`, :class:`Device` and :class:`Dtype`
    stand for values.

    Attributes:
        target: a module's name, or a function; the images' own step, the first, has none.
        shapes: of the returned tensor for a batch of two and of three; none if it returns several.
        path: where that tensor is in what the step returns.
        overwritten: whether a later step changes that tensor in place.
    """

    target: str | Callable[..., Any] | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ()
    path: tuple[Any, ...] = ()
    overwritten: bool = False

    @property
    def results(self) -> list[Result]:
        """The earlier steps' tensors that it takes."""
        return [value for value in leaves((self.args, self.kwargs)) if isinstance(value, Result)]

    @property
    def members(self) -> list[str]:
        """Names of the parameters and buffers that it takes."""
        return [value.name for value in leaves((self.args, self.kwargs)) if isinstance(value, Member)]


@dataclass
class Tape:
    """The steps of one mode (training or evaluation).

    Args:
        steps: the calls in order; number 0 stands for the images.
        output: what the network returns.
        first: the number of the first step.
    """

    steps: list[Step]
    output: Any
    first: int = 0

    @functools.cached_property
    def data(self) -> set[int]:
        """Numbers of steps that return something computed from the images."""
        found = {0}
        for index, step in enumerate(self.steps, start=self.first):
            if any(result.step in found for result in step.results):
                found.add(index)
        return found


def record(model: nn.Module, followed: Iterable[str], image: tuple[int, int, int]) -> dict[bool, Tape]:
    """Return the steps in training (True) and in evaluation (False).

    Args:
        followed: names of modules whose forward pass is looked into; all others are called whole.
        image: channels, height and width.

    Raises:
        Untraceable: numbers depend on the batch in another way than by a factor, or a tensor has an unknown source.
    """
    followed = {"", *followed}
    before = random.getstate()
    try:
        tapes = _record(without_data(model), followed, image)
    except Untraceable:
        raise
    except Exception:  # what needs real values: a true error is raised by them, too
        with torch.random.fork_rng(devices=[]):
            tapes = _record(copy.deepcopy(model), followed, image)
    if random.getstate() != before:
        raise Untraceable("it draws from Python's random numbers; torch's can be cut")
    return tapes


def _record(model: nn.Module, followed: set[str], image: tuple[int, int, int]) -> dict[bool, Tape]:
    tapes = {}
    for training in (True, False):
        model.train(training)
        two, three = (_Recorder(model, followed).run(batch, image) for batch in BATCHES)
        half = two
        if any(isinstance(value, torch.dtype) for step in two.steps for value in leaves((step.args, step.kwargs))):
            half = _Recorder(copy.deepcopy(model).bfloat16(), followed).run(BATCHES[0], image)
        tapes[training] = _merged(two, three, half)
    return tapes


class _Recorder(TorchFunctionMode):
    """Record what a network, a copy that may be changed, does with a batch of empty images."""

    def __init__(self, model: nn.Module, followed: set[str]) -> None:
        super().__init__()
        self.model = model
        self.steps: list[tuple[Any, Any, dict[tuple[Any, ...], tuple[Tensor, int]]]] = []  # with versions of tensors
        self.sources: dict[int, Result | Member] = {}  # id of a tensor -> where it is from
        self.varying = set[int]()  # numbers of steps that return something else at other times
        self.inside = 0  # depth of calls of whole modules
        for name, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            self.sources.setdefault(id(value), Member(name))
        self.whole = {name: module for name, module in model.named_modules() if name not in followed}

    def run(self, batch: int, image: tuple[int, int, int]) -> Tape:
        some = next(self.model.parameters())
        images = torch.empty(batch, *image, device=some.device, dtype=some.dtype)
        if some.device.type != "meta":
            images.zero_()
        self._keep(None, ((), {}), images)
        with torch.no_grad(), self._watched(), self:
            output = self.model(images)
        return Tape([self._step(*step) for step in self.steps], self._told(output))

    @contextmanager
    def _watched(self) -> Iterator[None]:
        own = {name: vars(module).get("forward") for name, module in self.whole.items()}
        for name, module in self.whole.items():
            module.forward = functools.partial(self._call, name, module.forward)
        try:
            yield
        finally:
            for name, module in self.whole.items():
                del module.forward
                if own[name] is not None:
                    module.forward = own[name]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in _READS_VALUES and self._varies(args[0]):
            raise Untraceable("its own code reads values of a tensor, as branches on them do: move that into a module")
        returned = func(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__":  # of a property, as x.mT
            func, args = getattr, (*args[:1], func.__self__.__name__)  # type: ignore[attr-defined]
        changed = args[0] if returned is None and args else returned  # x[i] = y returns nothing
        if any(isinstance(value, Tensor) for value in leaves(changed)):
            self._keep(func, self._told((args, kwargs)), changed)
        return returned

    def _call(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        told = None if self.inside else self._told((args, kwargs))  # before the call, which may change lists
        self.inside += 1
        try:
            returned = forward(*args, **kwargs)
        finally:
            self.inside -= 1
        if told is not None:
            self._keep(name, told, returned)
        return returned

    def _keep(self, target: Any, told: Any, returned: Any) -> None:
        found = {path: (tensor, tensor._version) for path, tensor in _tensors(returned)}
        drawn = isinstance(target, str) or getattr(target, "__name__", None) in _DRAWS
        if target is None or drawn or any(map(self._mark_varies, leaves(told))):
            self.varying.add(len(self.steps))
        self.sources |= {id(tensor): Result(len(self.steps), path) for path, (tensor, _) in found.items()}
        self.steps.append((target, told, found))

    def _varies(self, tensor: Any) -> bool:
        return self._mark_varies(self.sources.get(id(tensor)))

    def _mark_varies(self, mark: Any) -> bool:
        return isinstance(mark, Member) or (isinstance(mark, Result) and mark.step in self.varying)

    def _told(self, value: Any) -> Any:
        """Return arguments with the sources of tensors in their place."""

        def source(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return Device()
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) not in self.sources:
                raise Untraceable("it uses a tensor that is no parameter or buffer")
            return self.sources[id(leaf)]

        return mapped(source, value)

    def _step(self, target: Any, told: Any, found: dict[tuple[Any, ...], tuple[Tensor, int]]) -> Step:
        args, kwargs = told
        if len(found) != 1:
            return Step(target, args, kwargs)
        ((path, (tensor, version)),) = found.items()
        return Step(target, args, kwargs, (tuple(tensor.shape),), path, tensor._version != version)


_READS_VALUES = ("__bool__", "__int__", "__float__", "__index__", "__contains__", "item", "tolist", "numpy")
"""Functions of a tensor that return its values as numbers."""

_DRAWS = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "normal", "multinomial")
"""Functions that draw random numbers."""


def _tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield every tensor in what a step returned, with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _tensors(item, (*path, index))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, (*path, key))


def _merged(two: Tape, three: Tape, half: Tape) -> Tape:
    """Return the tape for any batch and precision, from those of two batches and of another precision."""
    if not [s.target for s in two.steps] == [s.target for s in three.steps] == [s.target for s in half.steps]:
        raise Untraceable("what it computes depends on the number of images or on the precision")

    steps = []
    for calls in zip(two.steps, three.steps, half.steps, strict=True):
        first, second, _ = calls
        args, kwargs = _combined(*((step.args, dict(step.kwargs)) for step in calls), where=first.target)
        steps.append(Step(first.target, args, kwargs, first.shapes + second.shapes, first.path, first.overwritten))
    return Tape(steps, _combined(two.output, three.output, half.output, where="its output"))


def _combined(*values: Any, where: Any) -> Any:
    """Return one value for that of a batch of two, of three, and in another precision."""
    first, second, third = values
    if isinstance(first, tuple | list) and not isinstance(first, _MARKS) and len(first) == len(second):
        return _like(first, (_combined(*items, where=where) for items in zip(*values, strict=True)))
    if isinstance(first, slice):
        return slice(*(_combined(*(getattr(v, at) for v in values), where=where) for at in ("start", "stop", "step")))
    if isinstance(first, Mapping):
        return {key: _combined(*(value[key] for value in values), where=where) for key in first}
    if isinstance(first, torch.dtype) and first != third:
        return Dtype()
    number = isinstance(first, int) and not isinstance(first, bool)
    if number and first != second and first * BATCHES[1] == second * BATCHES[0]:
        return Batch(first // BATCHES[0])
    if first is second or first == second:
        return first
    raise Untraceable(f"{name_of(where)} depends on the number of images by more than a factor")


_MARKS = (Result, Member, Batch, Device, Dtype)


def name_of(target: Any) -> str:
    """Return a step's target as text."""
    return target if isinstance(target, str) else resolve_name(target) or getattr(target, "__name__", str(target))


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Return ``value`` with ``change`` applied to everything in its tuples, lists, slices and mappings."""
    if isinstance(value, _MARKS):
        return change(value)
    if isinstance(value, tuple | list):
        return _like(value, (mapped(change, item) for item in value))
    if isinstance(value, slice):
        return slice(*(mapped(change, getattr(value, at)) for at in ("start", "stop", "step")))
    if isinstance(value, Mapping):
        return {key: mapped(change, item) for key, item in value.items()}
    return change(value)


def _like(value: Any, items: Iterable[Any]) -> Any:
    """Return a list for a list, the same kind of named tuple for one, else a tuple (for torch.Size, too)."""
    if isinstance(value, list):
        return list(items)
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def leaves(value: Any) -> list[Any]:
    """Return everything in ``value``'s tuples, lists, slices and mappings."""
    found: list[Any] = []
    mapped(found.append, value)
    return found

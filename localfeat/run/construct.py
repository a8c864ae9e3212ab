"""Build objects from plain values, each checked against the type annotation of its argument."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from localfeat.run import trust
from localfeat.run.composition import unknown_key
from localfeat.utils.errors import UserError
from localfeat.utils.text import as_typed

_PARTIAL = "_partial_"
_T = TypeVar("_T")


def construct(node: dict[str, Any], key: str, **extra: Any) -> Any:
    """Build ``node["_target_"]`` from the other values of ``node``, each checked against its type annotation.

    ``extra`` holds arguments that no configuration can hold. With ``_partial_`` the target is returned uncalled, with
    its arguments bound.

    Raises:
        UserError: see :func:`target_and_values`.
    """
    target, values = target_and_values(node, key, extra)
    if node.get(_PARTIAL):
        return functools.partial(target, **values, **extra)
    made = target(**values, **extra)
    trust.check_fits(made, node["_target_"], key)
    return made


def target_and_values(
    node: dict[str, Any], key: str, extra: Collection[str] = ()
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the target that ``construct`` calls and its checked arguments, without ``extra``.

    Raises:
        UserError: an unknown or untrusted target, an unknown or missing argument, or a value of the wrong type.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise UserError(f"{key}={as_typed(node)}: it must be a group of values with a _target_ (see --cfg job)")
    partial = key == "decoder"  # one is built for each local module, with that module's shapes
    if node.get(_PARTIAL, False) is not partial:
        raise UserError(f"{key}.{_PARTIAL}={as_typed(node.get(_PARTIAL, False))}: it must be {as_typed(partial)}")
    target = trust.find(node["_target_"], key)
    values = {name: value for name, value in node.items() if name not in ("_target_", _PARTIAL)}
    return target, check_types(target, values, key, extra, partial=partial)


def _annotations(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the argument types of a function or constructor.

    A dataclass is read itself, not its ``__init__``: that repeats the bases' annotations as text, whose names may be
    imported only in the module of the base.
    """
    if dataclasses.is_dataclass(target):
        return typing.get_type_hints(target)
    return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)


def check_types(
    target: Callable[..., Any],
    values: Mapping[str, Any],
    key: str,
    extra: Collection[str] = (),
    *,
    partial: bool = False,
) -> dict[str, Any]:
    """Return ``values`` converted to the annotated types of ``target``'s parameters (1 to 1.0, a list to a tuple).

    Args:
        target: a function, or a class for its constructor.
        values: the arguments by name.
        key: their place in the configuration, for messages.
        extra: names of arguments that do not come from the configuration.
        partial: whether arguments may be missing.

    Raises:
        UserError: see :func:`check_values`.
    """
    hints = _annotations(target)
    named = {
        p.name: p
        for p in inspect.signature(target).parameters.values()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in extra
    }
    required = [] if partial else [name for name, parameter in named.items() if parameter.default is parameter.empty]
    return check_values(values, {name: hints.get(name, Any) for name in named}, required, key)


def check_values(
    values: Mapping[str, Any], hints: Mapping[str, Any], required: Collection[str], key: str
) -> dict[str, Any]:
    """Return ``values`` converted to the types in ``hints``.

    Args:
        values: the values by name.
        hints: the type of every known value.
        required: the names that must be given.
        key: their place in the configuration, for messages; "" for the top level.

    Raises:
        UserError: an unknown name, a missing name, or a value of the wrong type.
    """
    full = {name: f"{key}.{name}".lstrip(".") for name in hints}
    if unknown := [name for name in values if name not in full]:
        raise UserError(unknown_key(f"{key}.{unknown[0]}".lstrip("."), list(full.values())))
    if missing := [full[name] for name in required if name not in values]:
        raise UserError(f"{missing[0]} has to be given: {missing[0]}=<value>")
    return {name: _converted(value, hints[name], full[name]) for name, value in values.items()}


def typed(kind: type[_T], values: Mapping[str, Any], key: str) -> _T:
    """Return a ``kind`` (a dataclass) built from ``values``, each checked against its type.

    Raises:
        UserError: see :func:`check_values`, or ``kind`` itself refuses a value.
    """
    return kind(**check_types(kind, values, key))


def _converted(value: Any, hint: Any, key: str) -> Any:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    rules = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False, coerce_numbers_to_str=True)
    try:
        found = TypeAdapter(hint, config=rules).validate_python(value)
    except ValidationError as error:
        wanted = re.split(", (?:unable|got)", error.errors()[0]["msg"].removeprefix("Input should be "))[0]
        raise UserError(f"{key}={as_typed(value)}: it must be {_WANTED.get(wanted, wanted)}") from error
    if isinstance(value, bool) and isinstance(found, int | float) and not isinstance(found, bool):
        raise UserError(f"{key}={as_typed(value)}: it must be a number")  # to Python, true is 1
    return found


# pydantic's wording -> ours.
_WANTED = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "a text",
    "a finite number": "a finite number",
    "an instance of Sequence": "a list",
    "a valid tuple": "a list",
    "a valid dictionary": "a group of values",
    "Field required": "a list with more values",
}

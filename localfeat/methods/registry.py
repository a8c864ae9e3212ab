"""All methods by name, discovered from the files of this folder."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import traceback
from pathlib import Path
from typing import Any

import localfeat.methods
from localfeat.methods.base import AFTER_ALL, REGISTERED, Method, one_of
from localfeat.utils.errors import UserError

_SHARED = ("base", "site", "registry", "supervised", "objective", "local_module", "objectives", "parts")


def _discovered() -> dict[str, Method]:
    for module in pkgutil.iter_modules(localfeat.methods.__path__):
        if module.name not in _SHARED:
            _import(module.name)
    found = sorted(REGISTERED.values(), key=lambda entry: (entry.order, entry.method.name))
    return {entry.method.name: entry.method for entry in found}


def _import(name: str) -> None:
    """Import one file of this folder.

    Raises:
        UserError: it cannot be imported, or what it registers is not a method; names the file and the line.
    """
    try:
        importlib.import_module(f"{localfeat.methods.__name__}.{name}")
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).stem == name]
        line, said = (error.lineno, error.msg) if isinstance(error, SyntaxError) else ((lines or [1])[-1], error)
        raise UserError(f"localfeat/methods/{name}.py, line {line}: {type(error).__name__}: {said}") from error


METHODS = _discovered()
"""Methods by name, in the order of tables and plots."""

COLOURS = {name: entry.colour for name, entry in REGISTERED.items() if entry.colour is not None}
"""Colours of the methods that have one, by name."""


def order_of(name: str) -> int:
    """Return a method's place in tables and plots; unregistered methods come last."""
    return REGISTERED[name].order if name in REGISTERED else AFTER_ALL


def as_method(method: str | Method, **changes: object) -> Method:
    """Return a method by its name (see ``METHODS``), with some fields changed; a :class:`Method` as it is.

    Raises:
        UserError: an unknown name, or something else than a method.
    """
    if isinstance(method, str):
        one_of("method", method, tuple(METHODS))
        method = METHODS[method]
    if not isinstance(method, Method):
        given = method.__name__ if isinstance(method, type) else type(method).__name__
        raise UserError(f"method is {given}: give a name, one of {', '.join(METHODS)}, or a localfeat.Method")
    return dataclasses.replace(method, **changes)  # type: ignore[arg-type]


def settings_of(method: Method) -> dict[str, Any]:
    """Return a method as a configuration: ``_target_`` and every field, tuples as lists."""
    own = type(method)
    public = getattr(localfeat, own.__name__, None) is own
    target = f"localfeat.{own.__name__}" if public else f"{own.__module__}.{own.__qualname__}"
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {"_target_": target, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}

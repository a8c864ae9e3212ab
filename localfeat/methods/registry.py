"""Every method by its name: found in the files of this folder, none is listed anywhere else."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

import localfeat.methods
from localfeat.methods.base import AFTER_ALL, REGISTERED, Method, one_of

_SHARED = ("base", "site", "registry", "objective", "local_module", "parts")


def _discovered() -> dict[str, Method]:
    for module in pkgutil.iter_modules(localfeat.methods.__path__):
        if module.name not in _SHARED:
            importlib.import_module(f"{localfeat.methods.__name__}.{module.name}")
    found = sorted(REGISTERED.values(), key=lambda entry: (entry.order, entry.method.name))
    return {entry.method.name: entry.method for entry in found}


METHODS = _discovered()
"""By name, in the order of tables and plots."""

COLOURS = {name: entry.colour for name, entry in REGISTERED.items() if entry.colour is not None}
"""Of the methods that have one."""


def order_of(name: str) -> int:
    """Place of a method in tables and plots; equal ones follow by name, and methods of others come last."""
    return REGISTERED[name].order if name in REGISTERED else AFTER_ALL


def as_method(method: str | Method, **changes: object) -> Method:
    """Return a method by its name (see ``METHODS``), with some fields changed; a :class:`Method` as it is.

    Raises:
        UserError: an unknown name.
    """
    if isinstance(method, str):
        one_of("method", method, tuple(METHODS))
        method = METHODS[method]
    return dataclasses.replace(method, **changes)  # type: ignore[arg-type]


def settings_of(method: Method) -> dict[str, Any]:
    """Return a method as a configuration has it: ``_target_`` and every field, tuples as lists."""
    own = type(method)
    target = "localfeat.Method" if own.__name__ == "HeadAndDecoder" else f"{own.__module__}.{own.__qualname__}"
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {"_target_": target, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}

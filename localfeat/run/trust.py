"""Restrict the code that a configuration may call to localfeat's own and to packages that the user trusts by name.

A configuration often comes from somebody else, with a run, a study or a download. The ``_target_`` of a group is called
with the group's values, so it must not name just anything that Python can import.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Callable
from typing import Any

from localfeat.utils.errors import UserError

VARIABLE = "LOCALFEAT_TRUST"
"""The environment variable that lists the packages, separated by commas, whose code configurations may call."""

_GIVEN = os.environ.get(VARIABLE, "")  # read at import, before a configuration can make Hydra set it

_OWN = "localfeat"
_FITTING = {
    "dataset": ("localfeat.ImageDataModule",),
    "split": ("localfeat.Split", "localfeat.BalancedSplit"),
    "decoder": tuple(f"localfeat.{name}Decoder" for name in ("Interp", "OneLayer", "Deconv")),
    "method": ("localfeat.Method",),
    "optimizer": ("localfeat.Optimization",),
    "efficiency": ("localfeat.Efficiency",),
    "logger": ("localfeat.run.loggers.wandb_logger.wandb_logger",),
}
"""For every group with a ``_target_``, the targets that fit it; subclasses of a class fit, too."""

_MOVED = {
    "localfeat.artifacts.wandb_logger.wandb_logger": "localfeat.run.loggers.wandb_logger.wandb_logger",
    "localfeat.Method": "localfeat.HeadAndDecoder",
    "localfeat.data.ImageDataModule": "localfeat.ImageDataModule",
    "localfeat.network.Split": "localfeat.Split",
    "localfeat.objectives.DeconvDecoder": "localfeat.DeconvDecoder",
    "localfeat.objectives.InterpDecoder": "localfeat.InterpDecoder",
    "localfeat.objectives.Method": "localfeat.HeadAndDecoder",
    "localfeat.objectives.OneLayerDecoder": "localfeat.OneLayerDecoder",
    "localfeat.optimization.Optimization": "localfeat.Optimization",
}
"""Target in configurations of version 0.1 -> its current name."""

_FAMILY = "localfeat.HeadAndDecoder"
_RENAMED: dict[str, dict[str, str | None]] = {
    _FAMILY: {"target": "reconstruct", "local": None},
    "localfeat.InterpDecoder": {"hidden_channels": None},
}
"""Target -> its keys in configurations of version 0.1 -> their current names; ``None`` if a key is gone."""

_END_TO_END = {"_target_": "localfeat.methods.e2e.EndToEnd", "detach": False}
"""End-to-end training, which was ``local=False`` of another class in version 0.1."""

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def current_name(path: Any) -> Any:
    """Return the current name of a target from an earlier version; return any other unchanged."""
    return _MOVED.get(path, path) if isinstance(path, str) else path


def current_group(values: dict[str, Any]) -> dict[str, Any]:
    """Return a group from an earlier version with the current names of its target and of its keys."""
    if "_target_" not in values:
        return values
    values = {**values, "_target_": current_name(values["_target_"])}
    if values["_target_"] == _FAMILY and values.get("local") is False:
        return {**_END_TO_END, **{key: values[key] for key in ("name", "label_smoothing") if key in values}}
    renamed = _RENAMED.get(str(values["_target_"]), {})
    return {name: value for key, value in values.items() if (name := renamed.get(key, key)) is not None}


def find(path: object, group: str) -> Callable[..., Any]:
    """Return the class or function that ``group._target_=path`` names.

    Only modules of localfeat and of trusted packages are imported.

    Raises:
        UserError: the target does not exist, is not trusted, or does not fit the group.
    """
    path = current_name(path)
    key = f"{group}._target_={path}"
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise UserError(f"{key}: it must be the full name of a class or function, like {_FITTING[group][0]}")
    package = next((name for name in (_OWN, *trusted()) if path.startswith(f"{name}.")), None)
    if package is None:
        raise UserError(
            f"{key}: only localfeat's own targets are allowed, as a configuration could run any code; if you trust "
            f"this one, set the environment variable {VARIABLE}={path.partition('.')[0]}"
        )
    target = _imported(path, key)
    if package == _OWN and not any(_is_kind_of(target, fitting) for fitting in _fitting(group)):
        raise UserError(f"{key}: it must be one of (or derived from) {', '.join(_FITTING[group])}")
    home = str(getattr(target, "__module__", None))
    if not callable(target) or not f"{home}.".startswith(f"{package}."):  # imported there
        raise UserError(f"{key}: it must be a class or function that {package} itself defines")
    return target


def check_fits(made: object, path: object, group: str) -> None:
    """Refuse an object of the wrong class, made by a trusted target.

    Raises:
        UserError: the object is not of the class that its group needs.
    """
    kinds = tuple(fitting for fitting in _fitting(group) if inspect.isclass(fitting))
    if kinds and not isinstance(made, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{group}._target_={path}: it makes a {type(made).__name__}, where a {wanted} is needed")


def trusted() -> tuple[str, ...]:
    """Return the names of the packages that the user trusts besides localfeat.

    Raises:
        UserError: a name is not a valid package name.
    """
    names = tuple(name.strip() for name in _GIVEN.split(",") if name.strip())
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"{VARIABLE}={_GIVEN}: {name} is not a package name (separate several with commas)")
    return names


def _fitting(group: str) -> list[Callable[..., Any]]:
    return [_imported(path, group) for path in _FITTING[group]]


def _is_kind_of(target: object, fitting: object) -> bool:
    return target is fitting or (inspect.isclass(target) and inspect.isclass(fitting) and issubclass(target, fitting))


def _imported(path: str, key: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        target: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, but something that it imports does not
        raise UserError(f"{key}: nothing of that name can be imported") from error
    return target

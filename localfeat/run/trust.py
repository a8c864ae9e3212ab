"""What a configuration may build: localfeat's own parts, and code of packages that the user trusts by name.

A configuration is often somebody else's: of a run that was handed on, of a study, of a folder from the network. The
``_target_`` of a group names what is called with the group's values, so it must not name whatever Python can import.
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
"""The environment variable with the packages, separated by commas, whose code configurations may call."""

_GIVEN = os.environ.get(VARIABLE, "")  # now: Hydra sets variables for a job when its configuration says so

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
"""For every group of values that has a ``_target_``: what fits it, and (of classes) what is derived from it."""

_MOVED = {
    "localfeat.artifacts.wandb_logger.wandb_logger": "localfeat.run.loggers.wandb_logger.wandb_logger",
    "localfeat.data.ImageDataModule": "localfeat.ImageDataModule",
    "localfeat.network.Split": "localfeat.Split",
    "localfeat.objectives.DeconvDecoder": "localfeat.DeconvDecoder",
    "localfeat.objectives.InterpDecoder": "localfeat.InterpDecoder",
    "localfeat.objectives.Method": "localfeat.Method",
    "localfeat.objectives.OneLayerDecoder": "localfeat.OneLayerDecoder",
    "localfeat.optimization.Optimization": "localfeat.Optimization",
}
"""What configurations of version 0.1 name -> its name now."""

_STANDS_FOR = {"localfeat.Method": "localfeat.HeadAndDecoder"}
"""``localfeat.Method`` is what methods are derived from; as a target it names the family of the first ones."""

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def current_name(path: Any) -> Any:
    """The name now of a target that a configuration of an earlier version names; any other as it is."""
    return _MOVED.get(path, path) if isinstance(path, str) else path


def find(path: object, group: str) -> Callable[..., Any]:
    """What ``group._target_=path`` names.

    A module is imported only if it is localfeat's or of a trusted package.

    Raises:
        UserError: no such thing, one that is not trusted, or one that does not fit the group.
    """
    path = current_name(path)
    key = f"{group}._target_={path}"
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise UserError(f"{key}: it must be the full name of a class or function, like {_FITTING[group][0]}")
    package = next((name for name in (_OWN, *trusted()) if path.startswith(f"{name}.")), None)
    if package is None:
        raise UserError(
            f"{key}: only localfeat's own parts are built, as a configuration could run any code; if you trust this "
            f"one, say so with the environment variable {VARIABLE}={path.partition('.')[0]}"
        )
    target = _imported(_STANDS_FOR.get(path, path), key)
    if package == _OWN and not any(_is_kind_of(target, fitting) for fitting in _fitting(group)):
        raise UserError(f"{key}: it is none of what fits there: {', '.join(_FITTING[group])}")
    home = str(getattr(target, "__module__", None))
    if not callable(target) or not f"{home}.".startswith(f"{package}."):  # what a trusted module has imported
        raise UserError(f"{key}: it must be a class or function that {package} itself defines")
    return target


def check_fits(made: object, path: object, group: str) -> None:
    """Refuse an object that a trusted target has made and that is not what its group is for.

    Raises:
        UserError: one line that says of which class it has to be.
    """
    kinds = tuple(fitting for fitting in _fitting(group) if inspect.isclass(fitting))
    if kinds and not isinstance(made, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{group}._target_={path}: it makes a {type(made).__name__}, where a {wanted} is needed")


def trusted() -> tuple[str, ...]:
    """Names of the packages that the user trusts beside localfeat.

    Raises:
        UserError: a name that no package can have.
    """
    names = tuple(name.strip() for name in _GIVEN.split(",") if name.strip())
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"{VARIABLE}={_GIVEN}: {name} is no package's name (several are separated by commas)")
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
            raise  # it is there, and something that it imports is not
        raise UserError(f"{key}: there is nothing of that name to import") from error
    return target

"""The configuration before it is built: Hydra's resolvers, typed construction, errors in one line.

Nothing heavy is imported here: ``--help`` and ``--cfg job`` answer from this module alone.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from localfeat.errors import UserError
from localfeat.paths import conf_dir


def register_resolvers() -> None:
    """Make the functions known that conf/ calls as ``${localfeat.…}``."""
    OmegaConf.register_new_resolver("localfeat.run_dir", _run_dir, replace=True)
    OmegaConf.register_new_resolver("localfeat.hydra_subdir", _hydra_subdir, replace=True)
    OmegaConf.register_new_resolver("localfeat.linear_lr", _linear_lr, replace=True)


def _run_dir(resume: str | None, new: str) -> str:
    """The run's folder: that of the run to resume, else a new one."""
    return resume or new


def _hydra_subdir(resume: str | None) -> str | None:
    """Where Hydra notes what was typed; a run that goes on keeps the note of what began it."""
    return None if resume else ".hydra"


def typed_overrides(folder: Path) -> list[str]:
    """What was typed to begin the run in ``folder``, as Hydra noted it (for a job of a sweep: that job's choices)."""
    file = folder / ".hydra" / "overrides.yaml"
    return [str(override) for override in OmegaConf.load(file)] if file.is_file() else []


def _linear_lr(lr: float, images: int, batch_size: int, accumulate: int) -> float:
    """``lr`` per ``images`` of an optimizer step, scaled linearly to the images that a step has."""
    return lr * batch_size * accumulate / images


def plain(node: DictConfig) -> dict[str, Any]:
    """A config as nested dicts and lists, every interpolation resolved.

    Raises:
        omegaconf.errors.MissingMandatoryValue: a value that has to be given was not.
    """
    return typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=True, throw_on_missing=True))


def construct(node: dict[str, Any], key: str, **extra: Any) -> Any:
    """Build ``node["_target_"]`` from the other values of ``node``, each checked against its type annotation.

    ``extra`` are arguments that no config can hold. With ``_partial_`` the callable itself comes back, with its
    arguments bound.

    Raises:
        UserError: an argument that the target does not take, or a value of another type.
    """
    from hydra.utils import get_object

    values = dict(node)
    target: Callable[..., Any] = get_object(values.pop("_target_"))
    partial = values.pop("_partial_", False)
    values = check_types(target, values, key)
    return functools.partial(target, **values, **extra) if partial else target(**values, **extra)


def check_types(target: Callable[..., Any], values: dict[str, Any], key: str) -> dict[str, Any]:
    """``values`` as the annotations of ``target``'s parameters have them (a list for a tuple, 1 for 1.0 …)."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    function = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(function)
    checked = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(unknown_key(f"{key}.{name}", [f"{key}.{known}" for known in hints if known != "return"]))
        try:
            adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True))
            checked[name] = adapter.validate_python(value)
        except ValidationError as error:
            raise UserError(f"{key}.{name}={value}: {error.errors()[0]['msg'].lower()}") from error
    return checked


def known_keys(overrides: list[str]) -> list[str]:
    """Every key of the configuration that the given group choices make."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return list(_flat(compose("config", overrides=overrides)))


def _flat(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in map(str, node):
        yield f"{prefix}{name}"
        if isinstance(node._get_node(name), DictConfig):
            yield from _flat(typing.cast(DictConfig, node._get_node(name)), f"{prefix}{name}.")


def unknown_key(key: str, known: list[str]) -> str:
    """One line that says so, with the nearest key that does exist."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:  # a right name at the wrong place: lr instead of optimizer.lr
        near = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return f"{key}: there is no such key" + (f"; did you mean {near[0]}?" if near else " (see --cfg job)")


def saved_config(folder: str | Path) -> dict[str, Any]:
    """The resolved configuration that a run left in its folder.

    Raises:
        UserError: no run's folder, or one whose file cannot be read.
    """
    file = Path(folder) / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder} is not the folder of a run: it has no config.yaml")
    try:
        return plain(typing.cast(DictConfig, OmegaConf.load(file)))
    except Exception as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error

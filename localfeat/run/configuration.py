"""The configuration before it is built: Hydra's resolvers, typed construction, errors in one line.

Nothing heavy is imported here: ``--help`` and ``--cfg job`` answer from this module alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import typing
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from localfeat.run import trust
from localfeat.run.conf_dir import conf_dir
from localfeat.run.hydra_guard import guard_hydra
from localfeat.run.literal import read_yaml
from localfeat.run.method_group import store_methods
from localfeat.utils.errors import UserError

_PARTIAL = "_partial_"
_LONGEST_NAME = 255  # bytes, of any usual file system


AUTO = "auto"
"""``resume=auto``: go on with the run that the same command began; begin it if there is none."""


def register_resolvers() -> None:
    """Make the functions known that conf/ calls as ``${localfeat.…}``, and have what Hydra itself builds checked."""
    guard_hydra()
    store_methods()
    OmegaConf.register_new_resolver("localfeat.run_dir", _run_dir, replace=True)
    OmegaConf.register_new_resolver("localfeat.linear_lr", _linear_lr, replace=True)


def _run_dir(resume: object, output_dir: object, name: object) -> str:
    """The folder that Hydra makes for a run; none for a run to resume, which has one (or is refused)."""
    if resume not in (None, AUTO):
        return "."
    if output_dir is None or str(output_dir).strip() == "":
        raise UserError("output_dir is empty: give the folder that gets a folder for every run, e.g. outputs")
    folder, (_, _, last) = f"{output_dir}/{name}", str(name).partition("/")  # <date>/<time>_<source>_<method.name>
    if not folder.isprintable():
        raise UserError(f"output_dir={folder!a}: a folder's name has no such characters")
    if "/" in last or len(last.encode()) > _LONGEST_NAME:
        raise UserError(f"method.name, in {last}, is part of a folder's name: no / and fewer than 200 letters, please")
    return folder


def typed_overrides(folder: Path) -> list[str]:
    """What was typed to begin the run in ``folder``, as Hydra noted it (for a job of a sweep: that job's choices)."""
    file = folder / ".hydra" / "overrides.yaml"
    if not file.is_file():
        return []
    found = read_yaml(file)
    if not isinstance(found, list):
        raise UserError(f"{file} cannot be read: it holds no list")
    return [str(override) for override in found if not str(override).startswith("resume=")]


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
    """What ``construct`` calls and the checked arguments for it, of which ``extra`` come from elsewhere.

    Raises:
        UserError: no such target or one that is not trusted, an argument that it does not take or that is missing, a
            value of another type.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise UserError(f"{key}={shown(node)}: it is a group of values, one of them _target_ (see --cfg job)")
    partial = key == "decoder"  # made once for each module, with what is known there
    if node.get(_PARTIAL, False) is not partial:
        raise UserError(f"{key}.{_PARTIAL}={shown(node.get(_PARTIAL, False))}: it must be {shown(partial)}")
    target = trust.find(node["_target_"], key)
    values = {name: value for name, value in node.items() if name not in ("_target_", _PARTIAL)}
    return target, check_types(target, values, key, extra, partial=partial)


def _annotations(target: Callable[..., Any]) -> dict[str, Any]:
    """Types of the arguments of a function or constructor, evaluated where they were written.

    The constructor of a dataclass repeats its bases' annotations as text, which may name what only the module of
    the base has imported.
    """
    if dataclasses.is_dataclass(target):
        return typing.get_type_hints(target)
    return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)


def check_types(
    target: Callable[..., Any], values: dict[str, Any], key: str, extra: Collection[str] = (), *, partial: bool = False
) -> dict[str, Any]:
    """``values`` as the annotations of ``target``'s parameters have them (a list for a tuple, 1 for 1.0 …).

    Args:
        target: a function, or a class for its constructor.
        values: arguments by name.
        key: where they stand in the configuration, for messages; "" for the top level.
        extra: names of arguments that do not come from the configuration.
        partial: whether arguments may be missing.

    Raises:
        UserError: an argument that ``target`` does not take or that is missing, a value of another type.
    """
    hints = _annotations(target)
    named = [
        p for p in inspect.signature(target).parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    full = {p.name: f"{key}.{p.name}".lstrip(".") for p in named if p.name not in extra}
    if unknown := [name for name in values if name not in full]:
        raise UserError(unknown_key(f"{key}.{unknown[0]}".lstrip("."), list(full.values())))
    missing = [full[p.name] for p in named if p.name in full and p.default is p.empty and p.name not in values]
    if missing and not partial:
        raise UserError(f"{missing[0]} has to be given: {missing[0]}=<value>")
    return {name: _converted(value, hints.get(name, Any), full[name]) for name, value in values.items()}


def _converted(value: Any, hint: Any, key: str) -> Any:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    rules = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False, coerce_numbers_to_str=True)
    try:
        found = TypeAdapter(hint, config=rules).validate_python(value)
    except ValidationError as error:
        wanted = re.split(", (?:unable|got)", error.errors()[0]["msg"].removeprefix("Input should be "))[0]
        raise UserError(f"{key}={shown(value)}: it must be {_WANTED.get(wanted, wanted)}") from error
    if isinstance(value, bool) and isinstance(found, int | float) and not isinstance(found, bool):
        raise UserError(f"{key}={shown(value)}: it must be a number")  # Python counts true as 1
    return found


# What pydantic says in words of its own.
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


def shown(value: object) -> str:
    """A value as one types it on the command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{shown(v)}" for key, v in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


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
    """One line that says so, with the keys that may have been meant."""
    last = key.rsplit(".", 1)[-1]
    near = [name for name in known if name.rsplit(".", 1)[-1] == last]  # right, but elsewhere: lr for optimizer.lr
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [
        name for name in known if difflib.SequenceMatcher(None, name.rsplit(".", 1)[-1], last).ratio() > 0.8
    ]
    return f"{key}: there is no such key" + (f"; did you mean {' or '.join(near[:3])}?" if near else " (see --cfg job)")


def saved_config(folder: str | Path) -> dict[str, Any]:
    """The resolved configuration that a run left in its folder, as it stands there: nothing is looked up.

    Raises:
        UserError: no run's folder, or one whose file cannot be read.
    """
    file = Path(folder) / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder} is not the folder of a run: it has no config.yaml")
    config = read_yaml(file)
    if not isinstance(config, dict):
        raise UserError(f"{file} cannot be read: it holds no keys with values")
    for group in config.values():
        if isinstance(group, dict) and "_target_" in group:
            group["_target_"] = trust.current_name(group["_target_"])
    missing = [group for group in _GROUPS if not isinstance(config.get(group), dict)]
    if missing:
        raise UserError(f"{folder} is not the folder of a run: its config.yaml has no {', '.join(missing)}")
    return config


_GROUPS = ("dataset", "backbone", "split", "method")


def saved_network(folder: str | Path) -> dict[str, Any]:
    """The same for those who build the run's network again: what that takes is there, and of its type.

    Raises:
        UserError: see :func:`saved_config`; a part that is missing or of another type.
    """
    config = saved_config(folder)
    try:
        check_types(_network, {key: config.get(key) for key in ("image_size", "decoder", "optimizer")}, "")
        check_types(_backbone, {key: config["backbone"].get(key) for key in ("name", "variants")}, "backbone")
    except UserError as error:
        raise UserError(f"{Path(folder) / 'config.yaml'} cannot be read: {error}") from error
    return config


def _network(image_size: int, decoder: dict[str, Any], optimizer: dict[str, Any]) -> None:
    """What a network is built of beside ``_GROUPS``, and the types."""


def _backbone(name: str, variants: dict[int, str]) -> None:
    """Likewise of the backbone."""

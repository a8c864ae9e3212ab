"""The configuration as Hydra composes it: resolvers, plain values, known keys.

Nothing heavy is imported here, because ``--help`` and ``--cfg job`` need this module.
"""

from __future__ import annotations

import difflib
import os
import threading
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from localfeat.run.conf_dir import conf_dir
from localfeat.run.method_group import store_methods
from localfeat.utils.errors import UserError

_LONGEST_NAME = 255  # bytes, the limit of all common file systems

AUTO = "auto"
"""``resume=auto``: resume the run that the same command began, or begin it."""


_ONE_AT_A_TIME = threading.RLock()  # Hydra keeps its state in the process

PATHS = ("output_dir", "dataset.root", "backbone.weights", "resume", "hydra.run.dir", "hydra.sweep.dir")
"""Keys of the configuration that name a file or a folder; ``~`` in them is the home folder."""


def with_home(values: typing.Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values with ``~`` expanded in their ``PATHS``."""
    found = dict(values)
    for key in PATHS:
        group, _, name = key.rpartition(".")
        inside = found.get(group) if group else found
        if isinstance(inside, dict) and isinstance(path := inside.get(name), str) and path.startswith("~"):
            changed = {**inside, name: os.path.expanduser(path)}
            found = {**found, group: changed} if group else changed
    return found


def register_resolvers() -> None:
    """Register the functions that conf/ calls as ``${localfeat.…}``, and the choices of ``method=``."""
    store_methods()
    OmegaConf.register_new_resolver("localfeat.run_dir", _run_dir, replace=True)
    OmegaConf.register_new_resolver("localfeat.choice", _choice, replace=True)
    OmegaConf.register_new_resolver("localfeat.linear_lr", _linear_lr, replace=True)


def _run_dir(resume: object, output_dir: object, name: object) -> str:
    """Return the folder that Hydra creates for a run; "." for ``resume=<folder>``, which has its folder already."""
    if resume not in (None, AUTO):
        return "."
    if output_dir is None or str(output_dir).strip() == "":
        raise UserError("output_dir is empty: give the parent folder of all runs, e.g. outputs")
    folder, (_, _, last) = (
        os.path.expanduser(f"{output_dir}/{name}"),
        str(name).partition("/"),
    )  # <date>/<time>_<source>_<method.name>
    if not folder.isprintable():
        raise UserError(f"output_dir={folder!a}: a folder's name cannot have such characters")
    if "/" in last or len(last.encode()) > _LONGEST_NAME:
        raise UserError(f"method.name, in {last}, is part of a folder's name: use fewer than 200 letters and no /")
    return folder


def _choice(group: str, *, _root_: DictConfig) -> str:
    """Return the name of the file chosen for a group."""
    from hydra.core.hydra_config import HydraConfig

    hydra_cfg = _root_["hydra"] if "hydra" in _root_ else HydraConfig.get()
    return str(hydra_cfg.runtime.choices[group]).rpartition("/")[2]


def _linear_lr(lr: float, images: int, batch_size: int, accumulate: int) -> float:
    """Return ``lr``, which is meant for steps of ``images`` images, scaled linearly to the images of a step."""
    return lr * batch_size * accumulate / images


def plain(node: DictConfig) -> dict[str, Any]:
    """Return a config as nested dicts and lists, with every interpolation resolved.

    Raises:
        omegaconf.errors.MissingMandatoryValue: a required value is missing.
    """
    return typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=True, throw_on_missing=True))


def composed(overrides: Sequence[str], *, hydra_too: bool = False) -> DictConfig:
    """Return the configuration that Hydra composes for overrides; with ``hydra_too`` also Hydra's own part.

    The Hydra of an application that calls this stays as it was.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with _ONE_AT_A_TIME:
        register_resolvers()
        outer = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                cfg = compose("config", overrides=list(overrides), return_hydra_config=True)
        finally:
            GlobalHydra.instance().hydra = outer
    cfg.method.name = cfg.method.name  # may be the choice, which is Hydra's part
    if not hydra_too:
        with open_dict(cfg):
            del cfg["hydra"]
    return cfg


def known_keys(overrides: Sequence[str]) -> list[str]:
    """Return every key of the configuration that these group choices compose."""
    return list(_flat(composed(overrides)))


def _flat(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in map(str, node):
        yield f"{prefix}{name}"
        if isinstance(node._get_node(name), DictConfig):
            yield from _flat(typing.cast(DictConfig, node._get_node(name)), f"{prefix}{name}.")


def unknown_key(key: str, known: list[str], see: str = "--cfg job") -> str:
    """Return an error line for an unknown key, with the known keys that are most similar, else what shows all."""
    last = key.rsplit(".", 1)[-1]
    near = [name for name in known if name.rsplit(".", 1)[-1] == last]  # right name, wrong group: lr for optimizer.lr
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [
        name for name in known if difflib.SequenceMatcher(None, name.rsplit(".", 1)[-1], last).ratio() > 0.8
    ]
    return f"{key}: there is no such key" + (f"; did you mean {' or '.join(near[:3])}?" if near else f" (see {see})")

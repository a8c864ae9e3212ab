"""Check Hydra's own part of a configuration, which also names classes: callbacks, loggers, launchers.

A file in a folder given with ``--config-dir`` can set anything below ``hydra``, and Hydra builds it before a job
begins. Newer versions of Hydra refuse some well-known functions there; this check allows only what localfeat needs.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from localfeat.run.trust import VARIABLE, trusted
from localfeat.utils.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

_PARTS = ("hydra._internal.", "hydra_plugins.")
_LOGGING = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "colorlog.ColoredFormatter")
_POINTER = re.compile(r"\s*\$\{.*\}\s*", re.DOTALL)
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_ACTED_ON = ("callbacks", "launcher", "sweeper", "job_logging", "hydra_logging", "job.env_set")
_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
_NAMING = ("_target_", "class", "()")


def check_foreign(arguments: Sequence[str], own: Path) -> None:
    """Compose and check the configuration of every job of a command line, before Hydra acts on it.

    This is done only if other people's files may take part: with a configuration folder other than ``own``, or with
    overrides of Hydra's own part, as a study may have. Otherwise all comes from localfeat's own ``conf/``.

    Args:
        arguments: the command line's arguments.
        own: the folder of localfeat's own configuration.

    Raises:
        UserError: a chosen file ends in .yml; see also :func:`check_hydra`.
    """
    from hydra import version
    from hydra._internal.utils import get_args_parser

    version.setbase("1.3")  # as for the run itself, or Hydra would warn of what has changed since
    given = get_args_parser().parse_args(list(arguments))
    typed = [override.partition("=")[0] for override in given.overrides]
    elsewhere = given.config_dir or given.config_path or given.config_name
    if not elsewhere and not any("hydra" in key for key in typed if key not in _FOLDERS):
        return
    if given.config_dir is not None and not Path(given.config_dir).is_dir():
        return  # Hydra itself refuses it
    for file in Path(given.config_dir or own).glob("*/*.yml"):
        if f"{file.parent.name}={file.stem}" in given.overrides:
            raise UserError(f"{file}: rename it to {file.stem}.yaml")
    for config in _composed(given, own):
        check_hydra(config)


def _composed(given: Namespace, own: Path) -> Iterator[DictConfig]:
    """Yield the configuration of the command, then those of its jobs in a multirun."""
    from hydra import compose
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode

    folder = own if given.config_path is None else Path(__file__).parent / given.config_path
    path = create_config_search_path(str(folder))
    if given.config_dir is not None:
        beside = f"file://{Path(given.config_dir).resolve()}"
        path.prepend("command-line", beside, anchor=SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2("command", path)  # as hydra.main does; hydra.compose cannot add a folder
    parser = OverridesParser.create()
    parsed = parser.parse_overrides(given.overrides)
    single = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
    build = partial(compose, given.config_name or "config", return_hydra_config=True)
    try:
        first = build(overrides=single)
        yield first
        if not given.multirun and first.hydra.mode != RunMode.MULTIRUN:
            return
        params = [f"{key}={value}" for key, value in (first.hydra.sweeper.get("params") or {}).items()]
        swept = [override for override in parsed if override.is_sweep_override()]
        for job in product(*map(_choices, [*swept, *parser.parse_overrides(params)])):
            yield build(overrides=[*single, *job])
    finally:
        GlobalHydra.instance().clear()


def _choices(override: Override) -> list[str]:
    """Return one override for each value of a sweep override."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def check_hydra(config: DictConfig) -> None:
    """Refuse a ``config.hydra`` that names code outside Hydra and trusted packages, or sets environment variables.

    Raises:
        UserError: a key has such a value.
    """
    if "hydra" not in config:
        return
    found = OmegaConf.to_container(config._get_node("hydra"), resolve=False)
    own = (*_PARTS, *(f"{name}." for name in trusted()))
    for key, value in _flat(found, "hydra"):
        name = key.rpartition(".")[2]
        if name == "_target_" and value is not None and not str(value).startswith(own):
            raise UserError(f"{key}={value}: only Hydra's own parts are built, and those of packages in {VARIABLE}")
        if "logging" in key and name in _NAMING[1:] and value not in _LOGGING:
            raise UserError(f"{key}={value}: only {', '.join(_LOGGING)} are built")
        if "logging" in key and isinstance(value, str) and "://" in value and value not in _STREAMS:
            raise UserError(f"{key}={value}: only {' and '.join(_STREAMS)} are looked up")
        if key.startswith(tuple(f"hydra.{part}" for part in _ACTED_ON)) and _POINTER.fullmatch(str(value)):
            raise UserError(f"{key}={value}: give the value itself here, not a reference")
        if key.startswith("hydra.job.env_set"):
            raise UserError(f"{key}={value}: a configuration cannot set environment variables; set them yourself")


def _flat(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _flat(value, f"{prefix}.{name}")
    else:
        yield prefix, node

"""Hydra's own part of a configuration, which names classes, too: callbacks, loggers, launchers.

A file in a folder given with ``--config-dir`` can set anything below ``hydra``, which Hydra builds before a job begins.
Newer versions refuse a list of well-known functions there; this leaves what localfeat itself needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from localfeat.run.trust import VARIABLE, trusted
from localfeat.utils.errors import UserError

_PARTS = ("hydra._internal.", "hydra_plugins.")
_LOGGING = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "colorlog.ColoredFormatter")
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_NAMING = ("_target_", "class", "()")


def guard_hydra() -> None:
    """Have every configuration checked that Hydra puts together in this process from now on, before it uses it."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    load = ConfigLoaderImpl.load_configuration
    if getattr(load, "checks", False):
        return

    def load_configuration(*arguments: Any, **keywords: Any) -> DictConfig:
        try:
            config: DictConfig = load(*arguments, **keywords)
        except ValueError as error:
            if "integer string conversion" in str(error):  # what Python reads at most
                raise UserError("a number on the command line has more than 4300 digits") from error
            raise
        check_hydra(config)
        return config

    load_configuration.checks = True  # type: ignore[attr-defined]
    ConfigLoaderImpl.load_configuration = load_configuration  # type: ignore[method-assign]


def check_hydra(config: DictConfig) -> None:
    """Refuse code in ``config.hydra`` that is neither Hydra's nor of a trusted package, and variables to be set.

    Raises:
        UserError: names the key.
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
        if key.startswith("hydra.job.env_set."):
            raise UserError(f"{key}={value}: a configuration sets no variables of the environment, set them yourself")


def _flat(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _flat(value, f"{prefix}.{name}")
    else:
        yield prefix, node

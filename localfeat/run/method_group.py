"""The configuration group ``method``: every registered method with all its fields, for Hydra."""

from __future__ import annotations

from localfeat.methods.registry import METHODS, settings_of


def store_methods() -> None:
    """Put the choices of ``method=`` where Hydra looks for them beside the files of conf/."""
    from hydra.core.config_store import ConfigStore

    for name, method in METHODS.items():
        ConfigStore.instance().store(group="method", name=name, node=settings_of(method), provider="localfeat")

"""Published figures, each assigned only to rows with the same setting."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from localfeat.studies.report.settings import UNSET, Settings, flat, frozen

FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class Published:
    """What is known of one setting; None: nothing.

    Attributes:
        accuracy: top-1 on the test set, per cent.
        memory_saved: against end to end, per cent.
        memory_mb: of a training step, megabytes as printed.
        sources: where from and under which reservations, a line each.
    """

    accuracy: float | None = None
    memory_saved: float | None = None
    memory_mb: float | None = None
    sources: tuple[str, ...] = ()


QUANTITIES = ("accuracy", "memory_saved", "memory_mb")


def published_for(found: Settings) -> Published:
    """The figures whose match keys all agree with ``found``; of two for a quantity the one with more keys.

    An accuracy is one on the test set, so that nothing stands beside an accuracy on validation.
    """
    values: dict[str, float] = {}
    sources: dict[str, None] = {}
    for figure in _by_detail():
        if not agrees(match_keys(figure["match"]), found):
            continue
        for quantity in QUANTITIES:
            if quantity == "accuracy" and found["split.of.accuracy"] != "test":
                continue
            if quantity in figure and quantity not in values:
                values[quantity] = float(figure[quantity])
                sources[source(figure["source"])] = None
    return Published(**values, sources=tuple(sources))


def agrees(keys: Mapping[str, Any], found: Settings) -> bool:
    """Tell whether ``found`` has every one of ``keys`` with its value; a missing key disagrees."""
    return all(
        found.get(key, UNSET) is not UNSET and frozen({key: found[key]}) == frozen({key: value})
        for key, value in keys.items()
    )


def match_keys(names: list[str]) -> Settings:
    """The keys that the named settings of published.yaml stand for."""
    return {key: value for name in names for key, value in flat(published()["settings"][name]).items()}


def source(name: str) -> str:
    """Return one line: the source of a figure, and its caveats."""
    entry = published()["sources"][name]
    return f"{entry['where']}: {entry['remark']}"


@functools.cache
def published() -> dict[str, Any]:
    """Return the file's content."""
    found: Any = OmegaConf.to_container(OmegaConf.load(FILE))
    return cast(dict[str, Any], found)


def _by_detail() -> list[dict[str, Any]]:
    return sorted(published()["figures"], key=lambda figure: -len(match_keys(figure["match"])))

"""Checks of a run's files: versions of localfeat write different ones, and files get damaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Kinds = Mapping[str, type | tuple[type, ...]]

NUMBER = (int, float)
CONFIG: Kinds = {
    "seed": int,
    "batch_size": int,
    "image_size": (int, list),
    "epochs": int,
    "dataset.source": str,
    "method.name": str,
}
SUMMARY: Kinds = {
    "method": str,
    "dataset": str,
    "backbone": str,
    "split": list,
    "seed": int,
    "epochs": int,
    "parameters.backbone": int,
    "parameters.auxiliary": int,
    "parameters.total": int,
    "versions": Mapping,
    "hardware": Mapping,
}
OPTIONAL: Kinds = {
    "test_accuracy": NUMBER,
    "val_accuracy": NUMBER,
    "peak_memory_bytes": int,
    "images_per_second": NUMBER,
    "classes": list,
    "commit": Mapping,
    "overrides": list,
}
"""Keys of summary.json that may be missing or null."""


def complaint(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str | None:
    """Describe missing or wrong values in config.yaml and summary.json; return ``None`` if there are none."""
    found = [("summary.json", key, _at(summary, key), kind) for key, kind in SUMMARY.items()]
    found += [("config.yaml", key, _at(config, key), kind) for key, kind in CONFIG.items()]
    if lost := [key for _, key, value, _ in found if value is None]:
        return f"it has no {', '.join(dict.fromkeys(lost))}"
    found += [("summary.json", key, summary.get(key), kind) for key, kind in OPTIONAL.items()]
    found += [("summary.json", "commit.id", _at(summary, "commit.id"), str)] if summary.get("commit") else []
    wrong = [f"{file} says {key}: {value}" for file, key, value, kind in found if not _fits(value, kind, key)]
    return wrong[0] if wrong else None


def _fits(value: Any, kind: type | tuple[type, ...], key: str) -> bool:
    if value is None:
        return key in OPTIONAL
    if isinstance(value, list):  # numbers of blocks, names of classes, overrides
        parts: type = int if key in ("split", "image_size") else str
        return list in (kind if isinstance(kind, tuple) else (kind,)) and all(isinstance(part, parts) for part in value)
    return isinstance(value, kind) and value == value  # NaN is not itself


def _at(found: Any, key: str) -> Any:
    """Return the value at a dotted key; ``None`` if missing."""
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def is_inspection(found: Mapping[str, Any]) -> bool:
    """Tell whether this is a valid result of ``localfeat probe``."""
    blocks = found.get("blocks")
    return isinstance(blocks, Sequence) and bool(blocks) and all(map(_is_block, blocks))


def _is_block(block: Any) -> bool:
    place = _at(block, "block")
    probes = [_at(block, name) for name in ("linear_probe", "knn")]
    return (isinstance(place, int) or place == "embedding") and all(isinstance(probe, NUMBER) for probe in probes)

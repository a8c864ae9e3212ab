"""Runs for reports: small real runs, and folders of larger runs written with the code of real runs."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from localfeat.run.composition import plain
from localfeat.run.conf_dir import conf_dir
from localfeat.run.loggers.metrics_csv import MetricsCsv
from localfeat.run.summary import RunSummary, write_summary
from tests.helpers.whole_runs import composed

GIB = 2**30
VERSIONS = {"python": "3.11.7", "torch": "2.15.0", "lightning": "2.6.6", "timm": "1.0.31", "localfeat": "0.1.0"}
GPU = {"cpu": "EPYC 9", "cores": 16, "threads": 16, "memory_gib": 128.0, "gpu": "H200", "gpus": 1}
COMMIT = {"id": "0123456789abcdef0123456789abcdef01234567", "dirty": False}
BLOCKS = {"e2e": [12], "k2": [4, 8], "k4": [2, 2, 6, 2]}


def written_run(folder: Path, overrides: Sequence[str], curve: Sequence[float], **figures: Any) -> Path:
    """Write a run's folder without its weights.

    Args:
        folder: the folder.
        overrides: the run's overrides.
        curve: the validation accuracy after each epoch, 0 to 1.
        figures: values of summary.json; ``test_accuracy`` also goes into metrics.csv.
    """
    folder.mkdir(parents=True)
    config = _config(overrides)
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    logger = MetricsCsv(folder)
    for epoch, value in enumerate(curve):
        logger.log_metrics({"val/accuracy": value, "epoch": epoch}, step=10 * epoch + 9)
    if figures.get("test_accuracy") is not None:
        logger.log_metrics({"test/accuracy": figures["test_accuracy"], "epoch": len(curve)}, step=10 * len(curve))
    logger.finalize("success")
    write_summary(folder / "summary.json", _summary(config, list(overrides), curve, figures))
    return folder


def _config(overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``composed(*overrides)``, which takes a quarter of a second, cached by the choice of groups."""
    known = {"method", *(path.name for path in conf_dir().iterdir() if path.is_dir())}
    groups = tuple(o for o in overrides if o.partition("=")[0] in known)
    config = _composed(groups).copy()
    for override in overrides:
        if override not in groups:
            key, _, value = override.lstrip("+").partition("=")
            OmegaConf.update(config, key, yaml_value(value), force_add=True)
    return plain(config)


@functools.cache
def _composed(groups: tuple[str, ...]) -> DictConfig:
    return composed(*groups)


def yaml_value(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[call-overload, index]


def _summary(config: dict[str, Any], overrides: list[str], curve: Sequence[float], figures: dict[str, Any]) -> Any:
    method, split = config["method"]["name"], ["k4", *(o[6:] for o in overrides if o.startswith("split="))][-1]
    known = {
        "peak_memory_bytes": 10 * GIB,
        "peak_memory_source": "CUDA's allocator",
        "images_per_second": 1000.0,
        "parameters": {"backbone": 27_500_000, "auxiliary": 0 if method == "e2e" else 900_000, "total": 28_400_000},
        "versions": VERSIONS,
        "hardware": GPU,
        "commit": COMMIT,
        "test_accuracy": None,
        "split": BLOCKS["e2e" if method == "e2e" else split],
    }
    return RunSummary(
        method=method,
        dataset=config["dataset"]["source"],
        backbone=config["backbone"]["name"],
        decoder=None,
        seed=config["seed"],
        epochs=len(curve),
        batch_size=config["batch_size"],
        precision=config["trainer"]["precision"],
        val_accuracy=max(curve),
        best_epoch=curve.index(max(curve)),
        overrides=overrides,
        **{**known, **figures},
    )


def write_study(folder: Path, question: str, jobs: Sequence[str]) -> None:
    """Write study.json as a sweep does before its first job."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "name": folder.name,
        "question": question,
        "jobs": [{"name": job, "overrides": job.split(","), "command": "python -m localfeat.run …"} for job in jobs],
    }
    (folder / "study.json").write_text(json.dumps(content))


def edit_summary(folder: Path, **figures: Any) -> None:
    """Change figures in summary.json."""
    file = folder / "summary.json"
    write_summary(file, {**json.loads(file.read_text()), **figures})

"""Check that a refactor changes no result: ten configurations, compared bit for bit between two checkouts.

    python experiments/reliability/refactor.py record <checkout> <folder>
    python experiments/reliability/refactor.py compare <folder> <folder>

``record`` trains them with the code of a checkout (some minutes on a CPU) and makes a report; ``compare`` compares
the metrics, the exported weights, ``summary.json`` and the report's figures, and exits with status 1 if any differ.
Times, memory of the process, commits, versions and commands are left out: they differ between runs.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

SHORT = ["epochs=2", "trainer=cpu", "trainer.limit_train_batches=6", "trainer.limit_val_batches=2"]
CONFIGURATIONS = {
    "e2e": ["method=e2e", "dataset.mixup=0.8", "dataset.cutmix=1.0"],
    "greedy_ce": ["method=greedy_ce", "split=even", "split.modules=3", "callbacks=ema"],
    "greedy_contrast": ["method=greedy_contrast", "split=k2"],
    "image_recon": ["method=image_recon", "split=k4", "decoder=deconv"],
    "image_recon_ce": ["method=image_recon_ce", "split=k2", "decoder=interp", "seed=3"],
    "feature_recon": ["method=feature_recon", "split=k4", "decoder=one_layer"],
    "feature_recon_bf16": ["method=feature_recon", "split=k2", "decoder=interp", "trainer.precision=bf16-mixed"],
    "feature_recon_ce": ["method=feature_recon_ce", "split=cuts", "split.cuts=[1,3]", "optimizer.accumulate=3"],
    "lean": ["method=feature_recon", "split=k4", "efficiency=lean", "decoder=deconv"],
    "balanced": ["method=feature_recon_ce", "split=balanced", "split.k=3", "efficiency=checkpoint"],
}
NOISE = ("seconds", "images_per_second", "peak_memory", "module_peak_memory", "peak_reserved", "commit", "command")
NOISE += ("versions", "hardware", "overrides", "time", "host", "speed/", "memory/", "dirty")


def record(checkout: Path, folder: Path) -> None:
    """Train the ten configurations with the code of ``checkout`` and report on them."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {**os.environ, **threads, "PYTHONPATH": str(checkout.resolve())}
    folder.mkdir(parents=True)
    runs = [(folder / "runs" / name).resolve() for name in CONFIGURATIONS]
    for run, overrides in zip(runs, CONFIGURATIONS.values(), strict=True):
        command = ["localfeat.run", *SHORT, *overrides, f"hydra.run.dir={run}", "callbacks.progress_bar=false"]
        subprocess.run([sys.executable, "-m", *command], cwd=folder, env=environment, check=True)
    old = (checkout / "localfeat" / "report.py").is_file()
    module = f"{'localfeat' if old else 'localfeat.studies'}.report"
    report = [sys.executable, "-m", module, *map(str, runs), f"output={(folder / 'report').resolve()}"]
    subprocess.run(report, cwd=folder, env=environment, check=True)


def results(folder: Path) -> dict[str, Any]:
    """Return, by name, everything in a recorded folder that a refactor must not change."""
    found: dict[str, Any] = {}
    for name in CONFIGURATIONS:
        run = folder / "runs" / name
        found[f"{name}: weights"] = _digest(run / "backbone.safetensors")
        with (run / "metrics.csv").open() as file:
            found[f"{name}: metrics"] = [_without_noise(row) for row in csv.DictReader(file)]
        found[f"{name}: summary"] = _without_noise(json.loads((run / "summary.json").read_text()))
    with (folder / "report" / "report.csv").open() as file:
        found["report"] = [_without_noise(row) for row in csv.DictReader(file)]
    return found


def _digest(file: Path) -> str:
    """Hash names, numbers and metadata; their order in a safetensors file differs between runs."""
    with safe_open(file, "np") as weights:
        digest = hashlib.sha256(repr(sorted(weights.metadata().items())).encode())
        for name in sorted(weights.keys()):
            digest.update(name.encode() + weights.get_tensor(name).tobytes())
    return digest.hexdigest()


def _without_noise(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if not any(part in key for part in NOISE)}


def compare(first: Path, second: Path) -> int:
    """Print what differs; return the exit status."""
    had, has = results(first), results(second)
    differing = [name for name in had if had[name] != has[name]]
    for name in differing:
        print(f"differs: {name}")
        for before, after in zip(_rows(had[name]), _rows(has[name]), strict=False):
            print(*(f"  {key}: {before[key]} -> {after.get(key)}" for key in before if before[key] != after.get(key)))
    print(f"{len(had) - len(differing)} of {len(had)} results are identical")
    return 1 if differing else 0


def _rows(found: Any) -> list[dict[str, Any]]:
    return found if isinstance(found, list) else [found if isinstance(found, dict) else {"it": found}]


if __name__ == "__main__":
    _, action, first, second = sys.argv
    if action == "record":
        record(Path(first), Path(second))
    else:
        sys.exit(compare(Path(first), Path(second)))

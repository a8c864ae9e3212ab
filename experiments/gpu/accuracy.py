"""Accuracy of three methods trained side by side, as many seeds and epochs as fit into the time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.memory.tables import table

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("e2e", "feature_recon", "feature_recon_ce")
SEEDS = 3  # that shall fit
MARGIN = 1.15  # a round may take so much longer than the one before
FIGURES = ("test_accuracy", "val_accuracy", "epochs", "seconds", "images_per_second", "peak_memory_bytes", "overrides")


def data(folder: str | None) -> list[str]:
    """Return the overrides for CIFAR-10 in an image folder, or without one for the digits."""
    return [] if folder is None else ["experiment=cifar10_small", f"dataset.root={Path(folder).resolve()}"]


def rows(
    overrides: Sequence[str], most_epochs: int, most_seeds: int, left: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Train all methods side by side for seed after seed; the first round, of one epoch, is for its time only."""
    with tempfile.TemporaryDirectory() as place:
        started = time.monotonic()
        first = round_of(overrides, 1, 0, Path(place, "first"), left())
        whole = time.monotonic() - started
        if first is None:
            return
        epoch = max(row["seconds"] for row in first)
        around = max(whole - epoch, 0.0)
        epochs = max(1, min(most_epochs, int((left() / (SEEDS * MARGIN) - around) / epoch)))
        seed, lasted = 0, around + epochs * epoch
        while left() > MARGIN * lasted and seed < most_seeds:
            started = time.monotonic()
            found = round_of(overrides, epochs, seed, Path(place, str(seed)), left())
            if found is None:
                return
            lasted = time.monotonic() - started
            seed += 1
            yield from found


def round_of(
    overrides: Sequence[str], epochs: int, seed: int, place: Path, seconds: float
) -> list[dict[str, Any]] | None:
    """Train every method at the same time; return their rows, None if they have not ended in ``seconds``.

    Raises:
        subprocess.CalledProcessError: a run failed; its output is printed.
    """
    cores = str(max(1, (os.cpu_count() or 1) // len(METHODS)))
    started = {}
    for method in METHODS:
        folder = place / method
        folder.mkdir(parents=True)
        own = [f"method={method}", f"seed={seed}", f"epochs={epochs}", "callbacks.progress_bar=false"]
        command = [sys.executable, "-m", "localfeat.run", *overrides, *own, f"hydra.run.dir={folder}/run"]
        with (folder / "log").open("w") as log:
            started[method] = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": cores}
            )
    end = time.monotonic() + max(seconds, 0)
    try:
        for method, process in started.items():
            if process.wait(max(0.0, end - time.monotonic())) != 0:
                print((place / method / "log").read_text(), file=sys.stderr)
                raise subprocess.CalledProcessError(process.returncode, process.args)
    except subprocess.TimeoutExpired:
        return None
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    summaries = {method: json.loads((place / method / "run" / "summary.json").read_text()) for method in METHODS}
    return [
        {"key": f"{method}, seed {seed}", "method": method, "seed": seed, **{key: summary[key] for key in FIGURES}}
        for method, summary in summaries.items()
    ]


def render(found: list[dict[str, Any]]) -> str:
    """Render mean and sample standard deviation over seeds as Markdown."""
    lines = []
    for method in METHODS:
        mine = [row for row in found if row["method"] == method]
        if not mine:
            continue
        accuracies = [100 * row["test_accuracy"] for row in mine]
        spread = f" ± {stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        speed = mean(row["images_per_second"] or 0 for row in mine)
        line = [f"`{method}`", f"{mean(accuracies):.2f}{spread}", str(len(mine)), str(mine[0]["epochs"])]
        lines.append([*line, f"{speed:.0f}"])
    return table(["method", "test accuracy (%)", "seeds", "epochs", "images/s, side by side"], lines)

"""Predicted against measured peaks of training steps."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from experiments.memory.cases import CLASSES, PRECISION_NAMES, PRECISIONS, Case, Network
from experiments.memory.tables import cuts, gib, settings, table
from localfeat.memory.accounting import step_memory
from localfeat.memory.emulation import Precision
from localfeat.run.callbacks.peak_memory import PeakMemory

BATCHES = 4
PREDICTING = 4  # processes


def rows(network: Network, cases: Sequence[Case], device: str, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Measure every case in fp32, then bf16, as long as there is time; predictions are made beside it."""
    todo = [(case, precision) for precision in PRECISIONS for case in cases]
    predicting = min(PREDICTING, os.cpu_count() or 1)
    with ProcessPoolExecutor(predicting, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        predictions = [pool.submit(predicted, network, case, precision, device) for case, precision in todo]
        for (case, precision), prediction in zip(todo, predictions, strict=True):
            if left() < 0:
                break
            facts = {**case.facts(), "precision": precision}
            yield {**facts, "measured": measured(network, case, precision, device), "predicted": prediction.result()}
        pool.shutdown(cancel_futures=True)


def predicted(network: Network, case: Case, precision: Precision, device: str) -> int:
    """Return the peak in bytes of a step on the meta device."""
    with torch.device("meta"):
        learner = case.learner(network)
    size, side = network.batch_size // case.accumulate, network.image_size
    target: Any = device
    found = step_memory(learner, batch_size=size, image_size=side, target=target, precision=precision)
    return found.peak_bytes


def measured(network: Network, case: Case, precision: Precision, device: str) -> int:
    """Return the peak in bytes of the third and later steps in a Trainer, as every run measures it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    size, side = network.batch_size // case.accumulate, network.image_size
    batch = torch.randn(size, 3, side, side), torch.arange(size) % CLASSES
    memory = PeakMemory()
    trainer = lightning.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=precision,
        max_steps=BATCHES,
        callbacks=[memory],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(case.learner(network), DataLoader([batch] * BATCHES, batch_size=None))
    assert memory.peak_bytes is not None
    return memory.peak_bytes


def render(found: list[dict[str, Any]]) -> str:
    """Render the rows as Markdown, with the median and the worst error."""
    header = ["precision", "method", "decoder", "after blocks", "efficiency", "GiB predicted", "measured", "ratio"]
    lines, errors = [], []
    for row in found:
        ratio = row["predicted"] / row["measured"]
        errors.append(abs(ratio - 1))
        line = [PRECISION_NAMES[row["precision"]], f"`{row['method']}`", row["decoder"] or "–", cuts(row)]
        lines.append([*line, settings(row), gib(row["predicted"]), gib(row["measured"]), f"{ratio:.4f}"])
    closing = f"{len(found)} settings: median error {median(errors):.2%}, worst {max(errors):.2%}."
    return f"{table(header, lines)}\n{closing}"

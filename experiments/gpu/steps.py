"""Step times of ways to train, in turn on one device, and the peak of each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.step_time import Steps, figures, in_turn
from experiments.memory.cases import CLASSES, PRECISION_NAMES, PRECISIONS, Case, Network
from experiments.memory.tables import cuts, gib, settings, table

WARM_UP = 3


def rows(
    network: Network, cases: Sequence[Case], rounds: int, device: str, left: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Time every case in bf16, then fp32, in up to ``rounds`` rounds, at least one, as long as there is time."""
    available = left()
    for number, precision in enumerate(reversed(PRECISIONS), start=1):
        ends = available * (1 - number / len(PRECISIONS))  # seconds that are left when this precision's time is over
        if left() <= ends:
            break
        peaks = {case.key: peak(network, case, precision, device) for case in cases}
        steps = {case.key: prepared(network, case, precision, device) for case in cases}
        taken = []
        for done in range(WARM_UP + rounds):
            (times,) = in_turn(steps, *batch(network, device), reference=cases[0].key, warm_up=0, rounds=1)
            taken.append(times)
            if left() <= ends and done >= WARM_UP:
                break
        del steps
        found = figures(taken[WARM_UP:], cases[0].key)
        for case in cases:
            seconds = found[case.key]["step_seconds"]
            yield {
                **case.facts(),
                "precision": precision,
                "rounds": len(taken) - WARM_UP,
                "step_seconds": seconds,
                "relative": found[case.key][f"relative_to_{cases[0].key}"],
                "images_per_second": network.batch_size / seconds,
                "peak_bytes": peaks[case.key],
            }


def prepared(network: Network, case: Case, precision: str, device: str) -> Steps:
    """Build a learner on the device, ready to step."""
    learner = case.learner(network).to(device)
    return Steps(learner, bf16=precision == "bf16-mixed", accumulate=case.accumulate)


def batch(network: Network, device: str) -> tuple[Tensor, Tensor]:
    """Return images and labels of the network's own batch size."""
    side, size = network.image_size, network.batch_size
    return torch.randn(size, 3, side, side, device=device), torch.arange(size, device=device) % CLASSES


def peak(network: Network, case: Case, precision: str, device: str) -> int | None:
    """Return the peak of allocated bytes in the third step, with nothing else on the device; None without CUDA."""
    if device != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    steps, (images, labels) = prepared(network, case, precision, device), batch(network, device)
    for _ in range(WARM_UP):
        torch.cuda.reset_peak_memory_stats()
        steps.seconds(images, labels)
    return torch.cuda.max_memory_allocated() - before


def render(found: list[dict[str, Any]]) -> str:
    """Render the rows as Markdown."""
    header = ["precision", "method", "after blocks", "efficiency", "step (s)", "relative", "images/s", "GiB", "rounds"]
    lines = []
    for row in found:
        line = [PRECISION_NAMES[row["precision"]], f"`{row['method']}`", cuts(row), settings(row)]
        line += [f"{row['step_seconds']:.4f}", f"{row['relative']:.2f}", f"{row['images_per_second']:.0f}"]
        lines.append([*line, "–" if row["peak_bytes"] is None else gib(row["peak_bytes"]), str(row["rounds"])])
    return table(header, lines)

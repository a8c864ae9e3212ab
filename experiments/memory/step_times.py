"""Step times relative to plain E2E, all settings in turn on this machine's CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.step_time import Steps, figures, in_turn
from experiments.memory import plots
from experiments.memory.cases import CLASSES, PRECISION_NAMES, Case, memory_row
from experiments.memory.plan import Plan
from experiments.memory.tables import Row, cuts, gib, saving, settings, table

REFERENCE = "e2e"


def chosen(cases: Sequence[Case], wanted: Sequence[str]) -> tuple[Case, ...]:
    """Return the reference and the cases whose key contains one of the texts; all cases if no text is given.

    Raises:
        ValueError: no key contains one of the texts.
    """
    for text in wanted:
        if not any(text in case.key for case in cases):
            raise ValueError(f"--settings {text!r}: none of {'; '.join(case.key for case in cases)}")
    rest = [case for case in cases[1:] if not wanted or any(text in case.key for text in wanted)]
    return (cases[0], *rest)


def measure(plan: Plan) -> dict[str, Any]:
    """Measure times in bf16 on this machine; memory is predicted for CUDA at the network's own batch size."""
    network = plan.main
    torch.manual_seed(0)
    images = torch.randn(plan.timed_batch, 3, network.image_size, network.image_size)
    labels = torch.arange(plan.timed_batch) % 2  # pairs for the contrastive loss
    steps = {case.key: Steps(case.learner(network), bf16=True, accumulate=case.accumulate) for case in plan.timed}
    reference = plan.timed[0].key
    rounds = in_turn(steps, images, labels, reference=reference, warm_up=plan.warm_up, rounds=plan.rounds)
    taken = _named(figures(rounds, reference), reference)
    rows = []
    for case in plan.timed:
        memory = {p: memory_row(network, case, p)["peak_bytes"] for p in plan.precisions}
        rows.append({**case.facts(), **taken[case.key], "peak_bytes": memory})
    return {
        "network": network.facts(),
        "timed_batch": plan.timed_batch,
        "threads": torch.get_num_threads(),
        "rounds": [{case.key: found[case.key] for case in plan.timed} for found in rounds],
        "classes": CLASSES,
        "rows": rows,
    }


def _named(found: Mapping[str, dict[str, float]], reference: str) -> dict[str, dict[str, float]]:
    """Put the ratio under a key that does not name the reference's settings."""
    old, new = f"relative_to_{reference}", f"relative_to_{REFERENCE}"
    return {key: {new if name == old else name: value for name, value in f.items()} for key, f in found.items()}


def render(found: dict[str, Any]) -> str:
    """Render the results as Markdown."""
    plain, precisions = found["rows"][0], list(found["rows"][0]["peak_bytes"])
    header = ["method", "K", "after blocks", "efficiency", "step (s)", "time relative to plain E2E"]
    for precision in precisions:
        header += [f"GiB, {PRECISION_NAMES[precision]}", "under plain E2E"]
    lines = []
    for row in found["rows"]:
        line = [f"`{row['method']}`", str(len(row["cuts"]) + 1), cuts(row), settings(row)]
        line += [f"{row['step_seconds']:.2f}", f"{row['relative_to_e2e']:.2f}"]
        for precision in precisions:
            line += [gib(row["peak_bytes"][precision]), saving(_memory(row, precision), _memory(plain, precision))]
        lines.append(line)
    network = found["network"]
    return (
        f"## {network['label']}, {network['image_size']} px\n\n"
        f"Times: {found['timed_batch']} images, bf16 autocast, {found['threads']} CPU threads, each setting right "
        f"after plain E2E, medians of {len(found['rounds'])} rounds. Memory: predicted for CUDA at "
        f"batch {network['batch_size']}. A GPU's ratios differ.\n\n{table(header, lines)}"
    )


def _memory(row: Row, precision: str) -> dict[str, float]:
    return {"peak_bytes": row["peak_bytes"][precision]}


def plot(found: dict[str, Any], folder: Path) -> None:
    """Plot memory against measured time."""
    for precision, name in PRECISION_NAMES.items():
        if precision not in found["rows"][0]["peak_bytes"]:
            continue
        points = [
            plots.Point(
                row["relative_to_e2e"],
                row["peak_bytes"][precision],
                row["method"],
                row["accumulate"],
                _label(row),
            )
            for row in found["rows"]
        ]
        network = found["network"]
        title = f"{network['label']}, {network['image_size']} px, batch {network['batch_size']}, {name}"
        axis = f"measured step time relative to plain E2E (CPU, bf16, {found['timed_batch']} images)"
        plots.trade(points, title, axis, folder / f"time_{name}.png")


def _label(row: Row) -> str:
    modules = f"K={len(row['cuts']) + 1} " if row["cuts"] else ""
    return f"{modules}{settings(row)}"


def with_rounds(plan: Plan, rounds: int | None, wanted: Sequence[str]) -> Plan:
    """Return the plan with fewer rounds or settings."""
    return replace(plan, rounds=rounds or plan.rounds, timed=chosen(plan.timed, wanted))

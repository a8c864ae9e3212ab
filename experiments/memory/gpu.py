"""Step times and measured peaks on a GPU next to the predictions: the settings of the part ``time`` at full batch.

    python experiments/memory/gpu.py [rounds]

fp32 and bf16, all settings in turn, medians of the ratios of each round; a setting's peak is that of CUDA's allocator
with nothing else on the device. Results: experiments/memory/results/gpu.{json,md}.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script: the other files are experiments.memory.*

from experiments.benchmarks.step_time import Steps, figures, in_turn  # noqa: E402
from experiments.memory.cases import PRECISION_NAMES, Case, memory_row  # noqa: E402
from experiments.memory.plan import Plan  # noqa: E402
from experiments.memory.tables import cuts, gib, settings, table  # noqa: E402
from localfeat.run.summary import environment  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP = 3


def prepared(case: Case, plan: Plan, precision: str, device: str) -> Steps:
    """Build a learner on the device, ready to step."""
    learner = case.learner(plan.main).to(device)
    return Steps(learner, bf16=precision == "bf16-mixed", accumulate=case.accumulate)


def batch(plan: Plan, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels of the network's own batch size."""
    side, size = plan.main.image_size, plan.main.batch_size
    return torch.randn(size, 3, side, side, device=device), torch.arange(size, device=device) % 10


def peak(case: Case, plan: Plan, precision: str, device: str) -> int | None:
    """Return the peak of allocated bytes in the third step; ``None`` without CUDA."""
    if device != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    steps, (images, labels) = prepared(case, plan, precision, device), batch(plan, device)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        steps.seconds(images, labels)
    return torch.cuda.max_memory_allocated() - before


def measure(plan: Plan, rounds: int, device: str) -> list[dict[str, Any]]:
    """Measure one row per precision and setting."""
    rows = []
    for precision in plan.precisions:
        measured = {case.key: peak(case, plan, precision, device) for case in plan.timed}
        steps = {case.key: prepared(case, plan, precision, device) for case in plan.timed}
        reference = plan.timed[0].key
        times = in_turn(steps, *batch(plan, device), reference=reference, warm_up=WARM_UP, rounds=rounds)
        taken = figures(times, reference)
        del steps
        for case in plan.timed:
            predicted = memory_row(plan.main, case, precision)["peak_bytes"]
            row = {**case.facts(), "precision": precision, "predicted": predicted, "measured": measured[case.key]}
            rows.append({**row, **taken[case.key]})
    return rows


def render(rows: list[dict[str, Any]], reference: str) -> str:
    """Render the rows as Markdown."""
    header = ["precision", "method", "after blocks", "efficiency", "step (s)", "relative", "GiB predicted", "measured"]
    lines = []
    for row in rows:
        line = [PRECISION_NAMES[row["precision"]], f"`{row['method']}`", cuts(row), settings(row)]
        line += [f"{row['step_seconds']:.3f}", f"{row[f'relative_to_{reference}']:.2f}", gib(row["predicted"])]
        lines.append([*line, "–" if row["measured"] is None else gib(row["measured"])])
    return table(header, lines)


def main() -> None:
    """Measure and write the results."""
    if not torch.cuda.is_available():
        sys.exit("this torch finds no GPU to use")
    plan = Plan()
    rows = measure(plan, int(sys.argv[1]) if len(sys.argv) > 1 else 10, "cuda")
    facts = environment()
    about = {key: facts[key] for key in ("versions", "hardware", "commit")}
    (RESULTS / "gpu.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    (RESULTS / "gpu.md").write_text(render(rows, plan.timed[0].key) + "\n")


if __name__ == "__main__":
    main()

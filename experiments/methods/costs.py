"""What every method costs: peak memory, training FLOPs and auxiliary parameters, by accounting; nothing is trained.

    python experiments/methods/costs.py

Swin-T at 224 px, batch 128, fp32, decoder=one_layer, ten classes, K=4: one stage per module, and cuts after the blocks
1, 2 and 5. `card` is what a first version of a method (a prototype, torch 2.15) was measured at, to compare with.
Results: experiments/methods/results/costs.{json,md}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch

from localfeat.learner.module import Learner
from localfeat.memory.accounting import step_flops, step_memory
from localfeat.methods.registry import METHODS, as_method

RESULTS = Path(__file__).parent / "results"
CUTS: dict[str, Any] = {"stages": 4, "cuts 1, 2, 5": [1, 2, 5]}
ROWS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name, method in METHODS.items() if name not in ("auglocal", "readout", "lookahead")),
    *(("auglocal", {"depth": depth}) for depth in (1, 2)),
    ("readout", {}),
    *(("lookahead", {"depth": depth}) for depth in (1, 2)),
    *((name, {"reconstruct": "features"}) for name in ("greedy_linear", "auglocal", "readout", "lookahead")),
]
CARDS = {  # GiB by stage, at cuts 1, 2 and 5, and the FLOPs relative to e2e
    "e2e": "13.14 / – / 1.00",
    "greedy_ce": "6.59 / 4.37 / 1.14–1.17",
    "feature_recon_ce": "6.69 / 4.64 / 1.16–1.20",
    "dgl": "6.69 / 4.48 / 1.01",
    "predsim": "6.60 / 4.38 / 1.17",
    "trgl": "7.01 / 4.78 / 1.00",
    "lopt": "6.58 / 4.48 / 1.01",
    "auglocal depth=1": "6.94 / 4.93 / 1.31",
    "man": "9.05 / 8.42 / 1.46",
    "readout": "6.94 / 4.93 / 1.31",
    "lookahead depth=1": "6.58 / 4.53 / 1.21",
    "lookahead depth=2": "6.70 / 4.87 / 1.37",
}


def cost(name: str, changes: dict[str, Any], cuts: Any) -> dict[str, float]:
    """Return the peak in bytes, FLOPs of an image and auxiliary parameters."""
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10)
        learner = Learner(model, as_method(name, **changes), cuts)
    found = step_memory(learner, batch_size=128, image_size=224, target="cuda", precision="32-true")
    auxiliary = learner.parameter_counts()["auxiliary"]
    return {
        "peak_bytes": found.peak_bytes,
        "flops": step_flops(learner, batch_size=128, image_size=224) / 128,
        "auxiliary": auxiliary,
    }


def main() -> None:
    """Measure, and write both files."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, changes in ROWS:
        label = " ".join([name, *(f"{key}={value}" for key, value in changes.items())])
        found[label] = {where: cost(name, changes, cuts) for where, cuts in CUTS.items()}
        print(label, flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "costs.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "costs.md").write_text(table(found))


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the table in Markdown."""
    base = found["e2e"]["stages"]
    lines = [
        "| method | GiB by stage | at cuts 1, 2, 5 | FLOPs by stage | at cuts 1, 2, 5 | auxiliary by stage | card |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, places in found.items():
        memory = " | ".join(f"{place['peak_bytes'] / 2**30:.2f}" for place in places.values())
        flops = " | ".join(f"{place['flops'] / base['flops']:.2f}" for place in places.values())
        auxiliary = f"{places['stages']['auxiliary'] / 1e6:.2f} M"
        lines.append(f"| `{label}` | {memory} | {flops} | {auxiliary} | {CARDS.get(label, '')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

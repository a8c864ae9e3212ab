"""CPU time of cutting a network: the first time, and again in the same process, where only the proof is made anew.

    python experiments/backbones/cutting.py

One thread, medians of five alternating rounds. Results: experiments/backbones/results/cutting.md.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import timm
import torch
from torch import nn

from localfeat.backbones import decompose as cutting

NETWORKS = ("swin_tiny_patch4_window7_224", "vit_base_patch16_224", "convnext_tiny")
ROUNDS = 5


def seconds(model: nn.Module) -> tuple[float, float, float]:
    """Return the CPU seconds of a first cut, of a second one, and of a second one without data."""
    cutting._TAPES.clear()
    with torch.device("meta"):
        empty = timm.create_model(model.default_cfg["architecture"])
    found = []
    for network in (model, model, empty):
        started = time.process_time()
        cutting.decompose(network, 224)
        found.append(time.process_time() - started)
    return found[0], found[1], found[2]


def main() -> None:
    """Measure all networks by turns and write the table."""
    torch.set_num_threads(1)
    models = {name: timm.create_model(name) for name in NETWORKS}
    rounds = [{name: seconds(model) for name, model in models.items()} for _ in range(ROUNDS)]
    lines = [
        "# CPU time of a cut",
        "",
        f"Made by `experiments/backbones/cutting.py`: seconds, medians of {ROUNDS} rounds on one thread.",
        "",
        "| network | first | again | again, on the meta device |",
        "|---|---|---|---|",
    ]
    for name in NETWORKS:
        medians = [median(values) for values in zip(*(found[name] for found in rounds), strict=True)]
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in medians)} |")
    (Path(__file__).parent / "results" / "cutting.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

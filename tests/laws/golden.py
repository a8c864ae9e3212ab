"""Losses at a fixed seed, which a refactor must leave as they are.

``python -m tests.laws.golden`` records the cases that have none yet. Cases that are named (``"lopt k4 one_layer"``) are
recorded anew: do that only when losses are meant to change, and say why in the commit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.helpers.small import Metrics, learner, loader, trainer

FILE = Path(__file__).with_name("golden_losses.json")
STEPS = 3
COUNTS = ("train/skipped_steps",)
CASES = [
    "e2e k4 one_layer",
    "greedy_ce k4 one_layer",
    "greedy_contrast k4 one_layer",
    "image_recon k2 interp",
    "image_recon k4 deconv",
    "image_recon k4 one_layer",
    "feature_recon k2 deconv",
    "feature_recon k4 interp",
    "feature_recon k4 one_layer",
    "feature_recon_ce k4 one_layer",
    "image_recon_ce k4 one_layer",
    "greedy_linear k4 one_layer",
    "trgl k4 one_layer",
    "auglocal k4 one_layer",
    "dgl k4 one_layer",
    "predsim k4 one_layer",
    "lopt k4 one_layer",
    "readout k4 one_layer",
    "lookahead k4 one_layer",
    "man k4 one_layer",
    "man_plus k4 one_layer",
    "deep_supervision k4 one_layer",
]


def losses(case: str) -> list[dict[str, float]]:
    """The training metrics of three steps, float32, CPU, one thread."""
    torch.set_num_threads(1)
    method, split, decoder = case.split()
    # A large eps: AdamW's first steps would turn rounding errors of gradients near zero into whole steps.
    model = learner(method, int(split[1:]), decoder=decoder, drop_path_rate=0.1, eps=1e-3, lr=1e-3, warmup=0.3)
    metrics = Metrics()
    trainer(metrics).fit(model, loader(STEPS))
    return [
        {name: v for name, v in step.items() if name.startswith("train/") and name not in COUNTS}
        for step in metrics.steps
    ]


if __name__ == "__main__":
    recorded = json.loads(FILE.read_text())
    kept = {case: steps for case, steps in recorded.items() if case in CASES and case not in sys.argv[1:]}
    FILE.write_text(json.dumps({case: kept.get(case) or losses(case) for case in CASES}, indent=1) + "\n")

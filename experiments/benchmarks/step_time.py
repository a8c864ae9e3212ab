"""Step time of every method against end-to-end training, in turn on one machine.

    python experiments/benchmarks/step_time.py [config overrides, e.g. split=k2 dataset=cifar10 batch_size=8]

Every round runs one training step of each method on the same random batch, in turn, so that a machine with other
work slows all of them alike. The first rounds are left out. Quoted: the median step and the median of the ratios
taken round by round. Results: experiments/results/step_time.{json,md}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from localfeat.artifacts.summary import environment
from localfeat.build import build_learner
from localfeat.config import plain, register_resolvers
from localfeat.learner import Learner
from localfeat.optimization import undecayed_parameters
from localfeat.paths import conf_dir

METHODS = ("e2e", "greedy_ce", "greedy_contrast", "image_recon", "feature_recon")
ROUNDS, WARM_UP = 30, 3
RESULTS = Path(__file__).resolve().parent.parent / "results"


class Steps:
    """One learner and its optimizers, a batch at a time, without a Trainer around it."""

    def __init__(self, config: dict[str, Any], classes: int) -> None:
        self.learner: Learner = build_learner(config, classes).train()
        kept = undecayed_parameters(self.learner.backbone)
        self.optimizers = [
            self.learner.optimization.build(module, kept, fused=True) for module in self.learner.local_modules
        ]
        self.bf16 = config["trainer"]["precision"] == "bf16-mixed"

    def seconds(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Wall time of one step: every module forward, backward, update."""
        started = time.perf_counter()
        features = images
        for module, optimizer in zip(self.learner.local_modules, self.optimizers, strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                output = module(features, images, labels)
            output.loss.backward()
            features = output.features
            del output
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - started


def configure(overrides: list[str]) -> dict[str, dict[str, Any]]:
    """The resolved configuration of every method."""
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return {m: plain(compose("config", overrides=[*overrides, f"method={m}"])) for m in METHODS}


def main() -> None:
    """Measure and write down."""
    overrides = sys.argv[1:] or ["experiment=cifar10_small", "dataset.root=unused", "split=k4"]
    configs = configure(overrides)
    config = configs["e2e"]
    torch.manual_seed(0)
    images = torch.randn(config["batch_size"], 3, config["image_size"], config["image_size"])
    labels = torch.randint(0, 10, (config["batch_size"],))
    steps = {method: Steps(configs[method], 10) for method in METHODS}
    rounds = [{m: s.seconds(images, labels) for m, s in steps.items()} for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
    lines = ["| method | median step (ms) | images/s | step time relative to `e2e` |", "|---|---|---|---|"]
    figures = {}
    for method in METHODS:
        step = median(r[method] for r in rounds)
        ratio = median(r[method] / r["e2e"] for r in rounds)
        figures[method] = {"step_seconds": step, "images_per_second": len(images) / step, "relative_to_e2e": ratio}
        lines.append(f"| `{method}` | {1000 * step:.0f} | {len(images) / step:.0f} | {ratio:.2f} |")
    facts = environment()
    precision, cores = config["trainer"]["precision"], torch.get_num_threads()
    lines += [
        "",
        f"`{' '.join(overrides)}`: batch {len(images)}, {config['image_size']} px, {precision}, {cores} threads of "
        f"{facts['hardware']['cpu']}, torch {torch.__version__}, median of {ROUNDS} rounds in turn.",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step_time.md").write_text("\n".join(lines) + "\n")
    found = {"overrides": overrides, "rounds": ROUNDS, "threads": cores, "methods": figures}
    found |= {key: facts[key] for key in ("versions", "hardware", "commit")}
    (RESULTS / "step_time.json").write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

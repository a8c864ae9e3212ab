"""Cost of checking for non-finite losses and gradients: step time with the check against step time without.

    python experiments/benchmarks/nonfinite_cost.py [config overrides, e.g. dataset=cifar10 batch_size=8]

The two learners have the same weights and take their steps in turn on the same random batch. "Without" only clips;
"with" does everything that a run does at every batch, on the CPU including reading the counters. The figure is the
median of the ratios of neighbouring steps, over both orders; on the CPU the ratios are of processor time, which other
processes disturb less than wall time. Results: experiments/results/nonfinite_cost.{json,md}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

from experiments.benchmarks.step_time import RESULTS, Steps, configure
from localfeat.learner.module import Learner
from localfeat.learner.nonfinite import NonFinite
from localfeat.run.build import build_learner
from localfeat.run.callbacks.nonfinite import Batch, StopOnNonFinite
from localfeat.run.callbacks.throughput import synchronize
from localfeat.run.configuration import RunConfiguration
from localfeat.run.summary import environment

METHODS = ("e2e", "feature_recon")
ROUNDS, WARM_UP = 60, 5
SETTINGS = {
    "digits": [],
    "cifar10_small": ["experiment=cifar10_small", "dataset.root=unused"],
}


class Unwatched(NonFinite):
    """A stand-in that checks nothing: the step as it would be without the check."""

    def begin(self, module: int) -> None:
        pass

    def see_loss(self, module: int, loss: Tensor) -> None:
        pass

    def before_step(self, module: int, optimizer: torch.optim.Optimizer) -> Tensor:
        return get_total_norm([p.grad for group in optimizer.param_groups for p in group["params"]])


class WatchedSteps(Steps):
    """Steps with the work that the learner does once per batch under a Trainer."""

    def seconds(self, images: Tensor, labels: Tensor) -> float:
        taken = super().seconds(images, labels)
        self.learner.nonfinite.count()
        if self.device == "cpu":
            batch = Batch(images, labels, 0, 0, self.learner.figures.latest, ".")
            StopOnNonFinite().look(self.learner, batch, self.optimizers)
        synchronize(images.device)
        return taken


def without(learner: Learner) -> Learner:
    """Return the same learner without the check."""
    learner.nonfinite = Unwatched(list(learner.local_modules))
    return learner


def ratios(config: RunConfiguration, images: Tensor, labels: Tensor) -> tuple[float, list[float]]:
    """Return the median seconds of a step without the check, and the with / without ratios of neighbouring steps."""
    bf16 = config.trainer.precision == "bf16-mixed"
    device = images.device
    torch.manual_seed(0)
    watched = WatchedSteps(build_learner(config, 10).to(device), bf16=bf16)
    watched.learner.nonfinite.start(device, None)
    torch.manual_seed(0)
    bare = Steps(without(build_learner(config, 10).to(device)), bf16=bf16)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found, times = [], []
    for number in range(WARM_UP + ROUNDS):
        first, second = (watched, bare) if number % 2 else (bare, watched)
        taken = {}
        for steps in (first, second):
            started = clock()
            steps.seconds(images, labels)
            taken[id(steps)] = clock() - started
        if number >= WARM_UP:
            times.append(taken[id(bare)])
            found.append(taken[id(watched)] / taken[id(bare)])
    return median(times), found


def main() -> None:
    """Measure and write the results."""
    settings = {"own": sys.argv[1:]} if sys.argv[1:] else SETTINGS
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [
        "| setting | method | modules | step without (ms) | with / without | quartiles |",
        "|---|---|---|---|---|---|",
    ]
    result: dict[str, Any] = {"rounds": ROUNDS, "threads": torch.get_num_threads(), "device": device.type, "found": {}}
    for name, overrides in settings.items():
        configs = configure([*overrides, "split=k4"])
        for method in METHODS:
            config = configs[method]
            images = torch.randn(config.batch_size, 3, config.image_size, config.image_size, device=device)
            labels = torch.randint(0, 10, (config.batch_size,), device=device)
            seconds, found = ratios(config, images, labels)
            low, _, high = quantiles(found, n=4)
            result["found"][f"{name} {method}"] = {"seconds": seconds, "ratio": median(found), "quartiles": [low, high]}
            modules = 1 if method == "e2e" else 4
            line = f"| `{name}` | `{method}` | {modules} | {1000 * seconds:.1f} | {median(found):.3f} |"
            lines.append(f"{line} {low:.3f} to {high:.3f} |")
            print(lines[-1], flush=True)
    facts = environment()
    lines += [
        "",
        f"{result['threads']} threads of {facts['hardware']['cpu']}"
        + (f", {facts['hardware']['gpu']}" if device.type == "cuda" else "")
        + f", torch {torch.__version__}, {ROUNDS} pairs of steps.",
    ]
    result |= {key: facts[key] for key in ("versions", "hardware", "commit")}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "nonfinite_cost.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "nonfinite_cost.json").write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

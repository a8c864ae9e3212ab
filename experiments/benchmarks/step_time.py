"""Step time of every method against end-to-end training, in turn on one machine.

    python experiments/benchmarks/step_time.py [config overrides, e.g. split=k2 dataset=cifar10 batch_size=8]

Every round runs one training step of each method on the same random batch, each right after a step of the reference,
so that other work on the machine slows both alike. The first rounds are left out. The figures are the median step and
the median of these ratios. Results: experiments/results/step_time.{json,md}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from localfeat.learner.module import Learner
from localfeat.learner.optimization import undecayed_parameters
from localfeat.methods.registry import METHODS
from localfeat.run.build import build_learner
from localfeat.run.callbacks.throughput import synchronize
from localfeat.run.composition import composed, plain
from localfeat.run.configuration import RunConfiguration
from localfeat.run.summary import environment

ROUNDS, WARM_UP = 30, 3
RESULTS = Path(__file__).resolve().parent.parent / "results"


class Steps:
    """One learner and its optimizers, a batch at a time: the learner's own loop without a Trainer around it.

    Args:
        learner: the learner, on the measured device.
        bf16: whether to use autocast as in Lightning's ``bf16-mixed``.
        accumulate: number of equal parts of the batch that share one optimizer step.
    """

    def __init__(self, learner: Learner, *, bf16: bool, accumulate: int = 1) -> None:
        self.learner = learner.train()
        kept = undecayed_parameters(learner.backbone, learner.local_modules)
        self.optimizers = [learner.optimization.build(module, kept, fused=True) for module in learner.local_modules]
        self.device = learner.device.type
        self.bf16 = bf16
        self.accumulate = accumulate

    def seconds(self, images: Tensor, labels: Tensor) -> float:
        """Return the wall time in seconds of one step: every module's forward, backward and update."""
        parts = zip(images.tensor_split(self.accumulate), labels.tensor_split(self.accumulate), strict=True)
        synchronize(images.device)
        started = time.perf_counter()
        for left in reversed(range(self.accumulate)):
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.bf16, cache_enabled=False):
                self.learner.train_modules(lambda: next(parts), self._backward, _no_update if left else self._update)
        synchronize(images.device)
        return time.perf_counter() - started

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(self.device, enabled=False):
            (loss / self.accumulate).backward()

    def _update(self, index: int) -> None:
        optimizer = self.optimizers[index]
        with torch.autocast(self.device, enabled=False):
            self.learner.on_before_optimizer_step(optimizer)
            optimizer.step()
        optimizer.zero_grad()


def _no_update(index: int) -> None:
    """Do nothing: this part of the batch only accumulates gradients."""


Taken = tuple[float, float]
"""Seconds of one step and of the reference's step just before it."""


def in_turn(
    steps: Mapping[str, Steps], images: Tensor, labels: Tensor, *, reference: str, warm_up: int, rounds: int
) -> list[dict[str, Taken]]:
    """Return the seconds of every learner's step, round by round, each with the reference's, without warm-up rounds.

    The reference runs before each of the others, as a machine's speed may change within a round.
    """

    def beside(name: str) -> Taken:
        before = steps[reference].seconds(images, labels)
        return before if name == reference else steps[name].seconds(images, labels), before

    return [{name: beside(name) for name in steps} for _ in range(warm_up + rounds)][warm_up:]


def figures(rounds: Sequence[Mapping[str, Sequence[float]]], reference: str) -> dict[str, dict[str, float]]:
    """Return the median seconds of every step, and its median ratio to the step of ``reference`` before it."""
    return {
        name: {
            "step_seconds": median(taken[name][0] for taken in rounds),
            f"relative_to_{reference}": median(taken[name][0] / taken[name][1] for taken in rounds),
        }
        for name in rounds[0]
    }


def configure(overrides: list[str]) -> dict[str, RunConfiguration]:
    """Compose the configuration of every method."""
    return {m: RunConfiguration.from_values(plain(composed([*overrides, f"method={m}"]))) for m in METHODS}


def main() -> None:
    """Measure and write the results."""
    overrides = sys.argv[1:] or ["experiment=cifar10_small", "dataset.root=unused", "split=k4"]
    configs = configure(overrides)
    config = configs["e2e"]
    torch.manual_seed(0)
    images = torch.randn(config.batch_size, 3, config.image_size, config.image_size)
    labels = torch.randint(0, 10, (config.batch_size,))
    bf16 = config.trainer.precision == "bf16-mixed"
    steps = {method: Steps(build_learner(configs[method], 10), bf16=bf16) for method in METHODS}
    found = figures(in_turn(steps, images, labels, reference="e2e", warm_up=WARM_UP, rounds=ROUNDS), "e2e")
    lines = ["| method | median step (ms) | images/s | step time relative to `e2e` |", "|---|---|---|---|"]
    for method, taken in found.items():
        step, ratio = taken["step_seconds"], taken["relative_to_e2e"]
        taken["images_per_second"] = len(images) / step
        lines.append(f"| `{method}` | {1000 * step:.0f} | {len(images) / step:.0f} | {ratio:.2f} |")
    facts = environment()
    precision, cores = config.trainer.precision, torch.get_num_threads()
    lines += [
        "",
        f"`{' '.join(overrides)}`: batch {len(images)}, {config.image_size} px, {precision}, {cores} threads of "
        f"{facts['hardware']['cpu']}, torch {torch.__version__}, median of {ROUNDS} rounds in turn.",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step_time.md").write_text("\n".join(lines) + "\n")
    result = {"overrides": overrides, "rounds": ROUNDS, "threads": cores, "methods": found}
    result |= {key: facts[key] for key in ("versions", "hardware", "commit")}
    (RESULTS / "step_time.json").write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Efficiency settings change no result: losses, gradients and training match the plain run, with less memory."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from localfeat.efficiency.settings import Efficiency
from localfeat.learner.module import Learner
from localfeat.memory.tracker import StorageTracker
from tests.helpers.small import batch, disturbed, gradients, learner

PLAIN = Efficiency()
SETTINGS = {
    "selective": Efficiency(recompute="selective"),
    "checkpoint": Efficiency(recompute="checkpoint"),
    "some blocks": Efficiency(recompute="checkpoint", blocks=[1, 3]),
    "slices": Efficiency(recompute="checkpoint", slices=3),
    "fused": Efficiency(fused_attention=True),
    "fused mlp": Efficiency(fused_mlp=True),
    "loss slices": Efficiency(loss_slices=3),
    "selective, lean": Efficiency(fused_attention=True, loss_slices=3, recompute="selective", fused_mlp=True),
    "slices, lean": Efficiency(fused_attention=True, loss_slices=3, recompute="checkpoint", slices=3, fused_mlp=True),
}
FAMILIES = ["swin", "swinv2", "vit", "convnext", "resnet"]
METHODS = ["feature_recon", "image_recon", "e2e"]
STEPS = 3


class Result(NamedTuple):
    losses: list[list[float]]  # per step and module
    gradients: dict[str, Tensor]  # of the first step


def train(model: Learner, precision: str = "32-true") -> Result:
    """Run three steps of the learner's own loop, each with its own batch and seed."""
    disturbed(model)
    model.train()
    optimizers = [model.optimization.build(module, [], fused=True) for module in model.local_modules]
    losses: list[list[float]] = []
    first: dict[str, Tensor] = {}

    def backward(loss: Tensor) -> None:
        losses[-1].append(float(loss.detach()))
        with torch.autocast("cpu", enabled=False):
            loss.backward()

    def update(index: int) -> None:
        if len(losses) == 1:
            first.update({f"{index}.{name}": g for name, g in gradients(model.local_modules[index]).items()})
        optimizers[index].step()
        optimizers[index].zero_grad()

    for step in range(STEPS):
        losses.append([])
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            model.train_modules(lambda step=step: batch(8, step), backward, update)
    return Result(losses, first)


def result(family: str, method: str, efficiency: Efficiency, precision: str = "32-true") -> Result:
    return train(learner(method, 4, family, drop_path_rate=0.3, efficiency=efficiency, lr=1e-3), precision)


@cache
def plain(family: str, method: str, precision: str = "32-true") -> Result:
    return result(family, method, PLAIN, precision)


def largest_difference(run: Result, expected: Result) -> float:
    """Return the largest relative difference of a gradient by norm, ignoring gradients of pure rounding noise."""
    assert run.gradients.keys() == expected.gradients.keys()
    scale = max(float(g.norm()) for g in expected.gradients.values())
    return max(
        float((run.gradients[name] - g).norm() / g.norm())
        for name, g in expected.gradients.items()
        if g.norm() > 1e-5 * scale
    )


def cases() -> list[tuple[str, str, str]]:
    """Return every setting on every family, methods in turn, but what has no effect or is refused.

    Batch normalisation refuses slices.
    """
    return [
        (setting, family, method)
        for number, (setting, efficiency) in enumerate(SETTINGS.items())
        for place, family in enumerate(FAMILIES)
        for method in ([METHODS[place % 2]] if setting == "loss slices" else [METHODS[(number + place) % 3]])
        if not (family == "resnet" and efficiency.slices > 1)
        and not (setting == "fused" and not family.startswith("swin"))
        and not (setting == "fused mlp" and family in ("convnext", "resnet"))  # no MLP of linear layers here
    ]


@pytest.mark.parametrize(("setting", "family", "method"), cases())
def test_training_is_that_of_the_plain_run(setting: str, family: str, method: str) -> None:
    run, expected = result(family, method, SETTINGS[setting]), plain(family, method)
    assert run.losses[0] == pytest.approx(expected.losses[0], rel=1e-5)
    assert largest_difference(run, expected) < 1e-5
    assert run.losses[-1] == pytest.approx(expected.losses[-1], rel=1e-3)
    assert run.losses[-1] != expected.losses[0]


@pytest.mark.parametrize("family", ["swin", "resnet"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_training_in_bfloat16_is_that_of_the_plain_run(setting: str, family: str) -> None:
    if family == "resnet" and SETTINGS[setting].slices > 1:
        pytest.skip("slices of batch normalisation are refused")
    run = result(family, "feature_recon", SETTINGS[setting], "bf16-mixed")
    expected = plain(family, "feature_recon", "bf16-mixed")
    for step in range(STEPS):
        assert run.losses[step] == pytest.approx(expected.losses[step], rel=2e-2)


def peak(efficiency: Efficiency) -> int:
    """Return the bytes of a step beyond persistent memory, for a deep, narrow network in one module."""
    model = learner("e2e", 1, "vit", efficiency=efficiency, changes={"depth": 8, "num_heads": 4, "patch_size": 4})
    images = batch(16)
    with StorageTracker([*model.parameters(), *model.buffers(), *images]) as tracker:
        persistent = tracker.live_bytes
        model.train_modules(lambda: images, lambda loss: loss.backward(), lambda index: None)
        return tracker.peak_bytes - persistent


def test_every_setting_needs_less_memory_than_the_one_before() -> None:
    names = ["selective", "checkpoint", "slices"]
    peaks = [peak(PLAIN), *(peak(SETTINGS[name]) for name in names)]
    for more, less in pairwise(peaks):
        assert less < 0.85 * more, peaks


@pytest.mark.parametrize("setting", SETTINGS)
def test_state_dict_keys_do_not_depend_on_the_setting(setting: str) -> None:
    """Load a checkpoint of one setting under any other."""
    own = learner("feature_recon", 4, "swin", efficiency=SETTINGS[setting]).state_dict()
    assert own.keys() == learner("feature_recon", 4, "swin").state_dict().keys()

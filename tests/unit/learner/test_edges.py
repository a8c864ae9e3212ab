"""Uncommon models, loaders and run lengths: right, or refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from localfeat.backbones.timm_models import build_backbone
from localfeat.learner.module import Learner
from localfeat.learner.optimization import Optimization
from localfeat.run.callbacks.logging_interval import LogShortRuns
from localfeat.run.callbacks.peak_memory import PeakMemory
from localfeat.utils.errors import UserError
from tests.helpers.small import AtStep, Metrics, backbone, batch, learner, loader, trainer
from tests.unit.learner.test_precision import fp16


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from zip(*batch(), strict=True)


def test_a_loader_without_a_length_trains_to_max_steps() -> None:
    metrics = Metrics()
    model = learner("greedy_ce", 2, warmup=0.0, lr=1e-3, final_lr=0.1)
    trainer(metrics, LogShortRuns(), max_steps=4).fit(model, DataLoader(Endless(), batch_size=8))
    rates = [step["train/lr"] for step in metrics.steps]
    assert rates[0] == pytest.approx(1e-3)
    assert rates == sorted(rates, reverse=True) and rates[-1] > 1e-4


def test_a_loader_without_a_length_and_no_steps_is_refused() -> None:
    with pytest.raises(UserError, match="needs an end"):
        trainer(max_epochs=2).fit(learner("greedy_ce", 2), DataLoader(Endless(), batch_size=8))


def gradient_norms(batches: int, **arguments: Any) -> list[float]:
    """Of the first module, at every step of its optimizer."""
    norms: list[float] = []

    def look(fit: Any, number: int) -> None:
        if number == 0:
            parameters = [p for group in fit.optimizers[0].param_groups for p in group["params"]]
            norms.append(float(torch.stack([p.grad.norm() for p in parameters]).norm()))

    model = learner("greedy_ce", 2, gradient_clip=None, accumulate=arguments.pop("accumulate", 1), lr=1e-12)
    trainer(AtStep(look), **arguments).fit(model, loader(batches))
    return norms


def test_a_short_last_window_is_averaged_over_its_own_batches() -> None:
    alone = gradient_norms(1)
    assert gradient_norms(1, accumulate=4) == pytest.approx(alone)
    assert len(gradient_norms(5, accumulate=4)) == 2


def test_max_steps_within_a_window_updates_with_what_there_is() -> None:
    assert gradient_norms(8, max_steps=3, accumulate=4) == pytest.approx(gradient_norms(3, accumulate=3))
    assert len(gradient_norms(8, max_steps=6, accumulate=4)) == 2


@pytest.mark.parametrize(
    ("position", "per_epoch", "left", "length"),
    [(0, 10, 99, 4), (7, 10, 99, 4), (8, 10, 99, 2), (9, 10, 99, 2), (5, float("inf"), 2, 3), (1, 10, 1, 2)],
)
def test_window(position: int, per_epoch: float, left: float, length: int) -> None:
    assert Optimization(accumulate=4).window(position, per_epoch, left) == length


def test_fp16_and_accumulation_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"16-mixed and optimizer\.accumulate"):
        trainer(plugins=fp16()).fit(learner("greedy_ce", 2, accumulate=2), loader(2))


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_peak_memory_counts_a_batch_that_updates(accumulate: int) -> None:
    """Accumulating saves nothing: the gradients of all modules are alive as well when one is being updated."""
    peaks = {}
    for every in (1, accumulate):
        memory = PeakMemory()
        trainer(memory).fit(learner("feature_recon", 4, accumulate=every), loader(3 * accumulate))
        peaks[every] = memory.peak_bytes
    assert peaks[accumulate] > peaks[1]


@pytest.mark.parametrize("family", ["swin", "vit", "convnext", "resnet"])
def test_timms_own_checkpointing_is_refused_since_it_would_do_nothing(family: str) -> None:
    model = backbone(family)
    model.set_grad_checkpointing(True)
    with pytest.raises(UserError, match="grad_checkpointing"):
        Learner(model, "greedy_ce", 2)
    model.set_grad_checkpointing(False)
    assert Learner(model, "greedy_ce", 2, image_size=32).blocks_per_module


def test_building_and_reconstructing_leave_every_modules_mode() -> None:
    model = backbone("resnet")
    model.bn1.eval()
    model.layer1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    made = Learner(model, "feature_recon", 2)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert made.reconstruct(batch(4)[0])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_images_are_reconstructed_in_the_readers_own_normalisation() -> None:
    images = torch.rand(2, 3, 32, 32)
    made = Learner(backbone("vit"), "image_recon", 2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert torch.allclose(made.reconstruct(images)[0].target, images)
    usual = Learner(backbone("vit"), "image_recon", 2)  # the ViT's own: (x - 0.5) / 0.5
    assert torch.allclose(usual.reconstruct((images - 0.5) / 0.5)[0].target, images, atol=1e-6)


def test_networks_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(UserError, match="num_classes=0"):
        Learner(build_backbone("resnet18", 0), "e2e", 1)
    with pytest.raises(UserError, match="other sizes in training than in evaluation"):
        Learner(backbone("vit", patch_drop_rate=0.5), "feature_recon", 2)
    frozen = learner("greedy_ce", 2)
    frozen.local_modules[1].requires_grad_(False)
    with pytest.raises(UserError, match="every one is frozen"):
        trainer().fit(frozen, loader(1))

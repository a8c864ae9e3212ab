"""Mixed precision on the CPU: backward outside autocast, clipping of unscaled gradients; and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from localfeat.efficiency.settings import Efficiency
from localfeat.methods.registry import METHODS
from tests.helpers.small import AtStep, Metrics, batch, gradients, learner, loader, trainer


def fp16(growth_interval: int = 2000) -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=growth_interval)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_runs_and_stays_near_float32(method: str) -> None:
    metrics = {}
    for precision in ("32-true", "bf16-mixed"):
        metrics[precision] = Metrics()
        model = learner(method, 4)
        trainer(metrics[precision], precision=precision).fit(model, loader(2), loader(1))
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    for exact, half in zip(metrics["32-true"].steps, metrics["bf16-mixed"].steps, strict=True):
        losses = [name for name in exact if "module" in name]
        assert [half[name] for name in losses] == [pytest.approx(exact[name], rel=0.05, abs=0.05) for name in losses]
        assert any(half[name] != exact[name] for name in losses)


@pytest.mark.parametrize("method", METHODS)
def test_backward_runs_outside_autocast_as_in_automatic_mode(method: str) -> None:
    """Gradients under bf16 are bit for bit those of forward in autocast and backward out of it."""
    found: dict[int, Any] = {}
    model = learner(method, 4, gradient_clip=None)
    trainer(
        AtStep(lambda _, number: found.update({number: gradients(model.local_modules[number])})), precision="bf16-mixed"
    ).fit(model, loader(1))
    reference = learner(method, 4)
    features, labels = batch()
    images = features
    for number, module in enumerate(reference.local_modules):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            output = module(features, images, labels)
        output.loss.backward()
        features = output.features
        expected = gradients(module)
        assert all(torch.equal(found[number][name], expected[name]) for name in expected)


def test_losses_are_computed_in_float32_under_autocast() -> None:
    for method in METHODS:
        images, labels = batch()
        features = images
        for module in learner(method, 4).local_modules:
            with torch.autocast("cpu", torch.bfloat16):
                output = module(features, images, labels)
            features = output.features
            assert {value.dtype for value in [output.loss, *output.terms.values()]} == {torch.float32}


def test_clipping_is_of_unscaled_gradients_in_fp16() -> None:
    """With the scale of 1024 on them the gradients would come out 1024 times too small."""
    clip = 1e-3
    norms: dict[int, list[float]] = {}

    def look(trainer: Any, number: int) -> None:
        parts = [p.grad.norm() for group in trainer.optimizers[number].param_groups for p in group["params"]]
        norms.setdefault(number, []).append(float(torch.stack(parts).norm()))

    model = learner("feature_recon", 4, gradient_clip=clip)
    trainer(AtStep(look), plugins=[fp16()]).fit(model, loader(2))
    assert norms == {number: [pytest.approx(clip, rel=1e-2)] * 2 for number in range(4)}


def test_the_scale_grows_by_batches_not_by_optimizer_steps() -> None:
    plugin = fp16()
    trainer(plugins=[plugin], max_epochs=1).fit(learner("greedy_ce", 4), loader(2))
    assert plugin.scaler is not None
    assert plugin.scaler.get_growth_interval() == 8000
    assert plugin.scaler.get_scale() == 2.0**10


def test_an_overflow_skips_the_step_and_lowers_the_scale() -> None:
    model = learner("greedy_ce", 2)
    before = [p.clone() for p in model.local_modules[0].parameters()]
    plugin = fp16()
    model.local_modules[0].objective.weights = {"cross_entropy": 1e6}  # beyond float16 with the scale
    trainer(plugins=[plugin]).fit(model, loader(1))
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() < 2.0**10
    for old, new in zip(before, model.local_modules[0].parameters(), strict=True):
        assert torch.equal(old, new)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["e2e", "feature_recon"])
def test_compiled_modules_give_the_same_losses(method: str) -> None:
    results = []
    for compile in (False, True):
        metrics = Metrics()
        torch._dynamo.reset()
        model = learner(method, 2, "vit", changes={"depth": 2}, efficiency=Efficiency(compile=compile))
        trainer(metrics).fit(model, loader(2), loader(1))
        results.append(metrics.steps)
        assert not [name for name in model.state_dict() if "_orig_mod" in name]
    for eager, compiled in zip(*results, strict=True):
        assert compiled == pytest.approx(eager, rel=1e-4)

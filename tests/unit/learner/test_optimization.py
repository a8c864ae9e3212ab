"""What an update allocates: under a GradScaler, too, never as much as the module's parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from localfeat.learner.optimization import Optimization
from localfeat.memory.tracker import StorageTracker
from tests.helpers.small import AtStep, learner, loader, trainer

LAYERS, WIDTH = 16, 64
LARGEST = WIDTH * WIDTH * 4  # bytes
SCALARS = 4 * LAYERS * 512


def module_with_gradients(device: str) -> nn.Module:
    module = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]).to(device)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    return module


def temporaries(module: nn.Module, optimizer: torch.optim.Optimizer, work: Any) -> int:
    """Bytes that ``work()`` needs beyond what is there when it begins."""
    state = [leaf for state in optimizer.state.values() for leaf in state.values()]
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    with StorageTracker([*module.parameters(), *gradients, *state]) as tracker:
        persistent = tracker.live_bytes
        work()
    return tracker.peak_bytes - persistent


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_update_without_the_fused_kernel_goes_parameter_by_parameter(device: str) -> None:
    module = module_with_gradients(device)
    optimizer = Optimization().build(module, set(), fused=False)
    optimizer.step()  # makes the states
    assert 0 < temporaries(module, optimizer, optimizer.step) <= 2 * LARGEST + SCALARS


def test_torchs_default_on_cuda_would_allocate_all_parameters_at_once() -> None:
    """Which is also the proof that the accounting sees such temporaries."""
    module = module_with_gradients("cpu")
    optimizer = Optimization().build(module, set(), fused=False)
    optimizer.step()
    for group in optimizer.param_groups:
        assert group["foreach"] is False  # None: torch decides, on CUDA for foreach
        group["foreach"] = True
    assert temporaries(module, optimizer, optimizer.step) >= LAYERS * LARGEST


def test_the_fused_kernel_allocates_nothing() -> None:
    module = module_with_gradients("cpu")
    optimizer = Optimization().build(module, set(), fused=True)
    optimizer.step()
    assert temporaries(module, optimizer, optimizer.step) <= SCALARS


@pytest.mark.parametrize("fused", [False, True])
def test_updates_are_the_same_with_and_without_the_fused_kernel(fused: bool) -> None:
    torch.manual_seed(0)
    module, settings = module_with_gradients("cpu"), Optimization(lr=0.1)
    expected = [p.detach() * (1 - 0.1 * settings.weight_decay) - 0.1 / (1 + 1e-8) for p in module.parameters()]
    settings.build(module, set(), fused=fused).step()
    torch.testing.assert_close(list(module.parameters()), expected)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("fused", [False, True])
def test_clipping_allocates_scalars(device: str, fused: bool) -> None:
    model = learner("greedy_ce", 2, "vit", gradient_clip=1e-3).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    (module, _) = model.local_modules
    optimizer = model.optimization.build(module, set(), fused=fused and device == "cpu")
    clip = lambda: model.on_before_optimizer_step(optimizer)  # noqa: E731
    count = len(list(module.parameters()))
    assert 0 < temporaries(module, optimizer, clip) <= (2 * count + 8) * 512
    if device == "cpu":
        norm = torch.stack([p.grad.norm() for p in module.parameters()]).norm()  # type: ignore[union-attr]
        assert norm == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("scaled", [False, True])
def test_only_a_grad_scaler_goes_without_the_fused_kernel(scaled: bool) -> None:
    kinds: list[tuple[bool, bool]] = []

    def look(trainer: Any, number: int) -> None:
        kinds.extend((group["fused"], group["foreach"]) for group in trainer.optimizers[number].param_groups)

    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaled else []
    trainer(AtStep(look), plugins=plugins, max_steps=1).fit(learner("greedy_ce", 2), loader(1))
    assert set(kinds) == {(not scaled, False)}

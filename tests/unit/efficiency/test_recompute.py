"""Recomputed blocks give the plain run's results and keep less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from localfeat.backbones.decompose import decompose
from localfeat.efficiency.recompute import block_runners, plainly
from localfeat.efficiency.selective import run_selectively
from localfeat.efficiency.settings import Efficiency
from localfeat.memory.emulation import Emulation
from localfeat.memory.tracker import StorageTracker
from localfeat.memory.work import WorkCounter
from localfeat.utils.errors import UserError
from tests.helpers.small import IMAGE_SIZE, backbone, batch, disturbed, gradients

FAMILIES = ["swin", "swinv2", "vit", "convnext", "resnet"]
SETTINGS = {
    "selective": Efficiency(recompute="selective"),
    "checkpoint": Efficiency(recompute="checkpoint"),
    "3 slices": Efficiency(recompute="checkpoint", slices=3),  # uneven: the batch is 8
    "99 slices": Efficiency(recompute="checkpoint", slices=99),
}
CASES = [(s, f) for s in SETTINGS for f in FAMILIES if f != "resnet" or "slices" not in s]
each_case = pytest.mark.parametrize(("setting", "family"), CASES)


class Run:
    """Run all blocks forward and backward once; return output, gradients, random state and buffers."""

    def __init__(self, family: str, efficiency: Efficiency, dtype: torch.dtype | None = None, **changes: Any) -> None:
        network = disturbed(backbone(family, drop_path_rate=0.3, **changes)).train()
        pieces = decompose(network, IMAGE_SIZE)
        runners = block_runners(pieces.blocks, efficiency)
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            x = pieces.stem(batch()[0])
            for block, run in zip(pieces.blocks, runners, strict=True):
                x = run(block, x)
        self.random = torch.rand(3)
        self.output = x.detach().float()
        x.float().square().mean().backward()
        self.random_after = torch.rand(3)
        self.gradients = gradients(network)
        self.buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}


def assert_same(run: Run, plain: Run, rtol: float = 1e-5) -> None:
    assert close(run.output, plain.output, rtol)
    assert run.gradients.keys() == plain.gradients.keys()
    wrong = [name for name, g in plain.gradients.items() if not close(run.gradients[name], g, rtol)]
    assert not wrong
    assert any(bool(g.any()) for g in plain.gradients.values())
    assert torch.equal(run.random, plain.random) and torch.equal(run.random_after, plain.random_after)
    for name, buffer in plain.buffers.items():
        torch.testing.assert_close(run.buffers[name], buffer)


def close(value: Tensor, expected: Tensor, rtol: float) -> bool:
    """Return the norm of the difference relative to the expected tensor's, as single elements may be tiny sums."""
    return bool((value - expected).norm() <= rtol * expected.norm() + 1e-7)


@each_case
def test_results_are_those_of_the_plain_run(setting: str, family: str) -> None:
    assert_same(Run(family, SETTINGS[setting]), Run(family, Efficiency()))


@each_case
def test_bfloat16_is_as_exact_as_in_the_plain_run(setting: str, family: str) -> None:
    """Compare both with full precision, as slices add rounded sums in a different order."""
    exact, plain = Run(family, Efficiency()), Run(family, Efficiency(), torch.bfloat16)
    run = Run(family, SETTINGS[setting], torch.bfloat16)
    assert_same(run, plain, rtol=0.15)
    assert error(run, exact) <= 1.05 * error(plain, exact)


def error(run: Run, exact: Run) -> float:
    """Return the relative error, averaged over all gradients."""
    errors = [(run.gradients[n] - g).norm() / g.norm() for n, g in exact.gradients.items() if g.any()]
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("setting", ["selective", "checkpoint"])
def test_running_statistics_are_updated_once(setting: str) -> None:
    assert_same(Run("resnet", SETTINGS[setting]), Run("resnet", Efficiency()))
    counted = Run("resnet", SETTINGS[setting]).buffers["layer1.0.bn1.num_batches_tracked"]
    assert int(counted) == 1


def test_only_the_named_blocks_are_recomputed() -> None:
    blocks = [nn.Linear(2, 2) for _ in range(3)]
    runners = block_runners(blocks, Efficiency(recompute="checkpoint", blocks=[2]))
    assert [run is plainly for run in runners] == [True, False, True]


def test_a_block_beyond_the_last_is_refused() -> None:
    with pytest.raises(UserError, match=r"efficiency.blocks names block 4: this backbone has blocks 1 to 3"):
        block_runners([nn.Linear(2, 2)] * 3, Efficiency(recompute="checkpoint", blocks=[2, 4]))


SLICES = Efficiency(recompute="checkpoint", slices=4)


def test_slices_of_a_network_with_batch_normalisation_are_refused() -> None:
    blocks = decompose(backbone("resnet"), IMAGE_SIZE).blocks
    with pytest.raises(UserError, match=r"efficiency.slices=4: .* batch normalisation needs .*slices=1"):
        block_runners(blocks, SLICES)
    for block in blocks:
        block.eval()
    runner = block_runners(blocks, SLICES)[0]  # frozen statistics are the same for every slice
    x = torch.randn(8, 64, 8, 8, requires_grad=True)
    torch.testing.assert_close(runner(blocks[0], x), blocks[0](x))
    blocks[0].train()
    with pytest.raises(UserError, match="batch normalisation"):
        runner(blocks[0], x)


@pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate"])
def test_slices_of_a_network_with_dropout_are_refused(rate: str) -> None:
    changes: dict[str, Any] = {rate: 0.1}
    blocks = decompose(backbone("vit", **changes), IMAGE_SIZE).blocks
    with pytest.raises(UserError, match=r"efficiency.slices=4: .* dropout of single elements"):
        block_runners(blocks, SLICES)


class PerToken(nn.Module):
    """Module that draws random numbers not one per image, which an inspection of the modules cannot find."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(x.shape[1], 1).bernoulli_(0.5)


def test_slices_of_a_block_with_other_random_numbers_are_refused() -> None:
    runner = block_runners([PerToken()], SLICES)[0]
    with pytest.raises(UserError, match="random numbers that are not one per image"):
        runner(PerToken(), torch.randn(8, 3, 2, requires_grad=True))


def one_block(efficiency: Efficiency) -> tuple[nn.Module, Any]:
    block = decompose(disturbed(backbone("swin", drop_path_rate=0.3)).train(), IMAGE_SIZE).blocks[1]
    return block, block_runners([block], efficiency)[0]


@pytest.mark.parametrize("setting", SETTINGS)
def test_hooks_see_the_whole_gradient_once_and_frozen_parameters_get_none(setting: str) -> None:
    found = []
    for efficiency in (SETTINGS[setting], Efficiency()):
        block, runner = one_block(efficiency)
        frozen, hooked = list(block.parameters())[:2]
        frozen.requires_grad_(False)
        seen: list[Tensor] = []
        hooked.register_hook(lambda g, seen=seen: seen.append(g.clone()) or 2 * g)
        for seed in (1, 2):  # the second backward accumulates
            torch.manual_seed(seed)
            x = torch.randn(8, 16, 16, 16)
            runner(block, x).square().mean().backward()
            assert x.grad is None and frozen.grad is None
        found.append([*seen, hooked.grad])
    for value, expected in zip(*found, strict=True):
        assert close(value, expected, 1e-5)
    assert len(found[0]) == 3


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_by_autograd_grad(setting: str) -> None:
    found = []
    for efficiency in (SETTINGS[setting], Efficiency()):
        block, runner = one_block(efficiency)
        torch.manual_seed(3)
        x = torch.randn(8, 16, 16, 16, requires_grad=True)
        loss = runner(block, x).square().mean()
        some = list(block.parameters())[3]
        found.append([*torch.autograd.grad(loss, [some, x], retain_graph=True), *torch.autograd.grad(loss, [some])])
        assert all(p.grad is None for p in block.parameters()) and x.grad is None
    for value, expected in zip(*found, strict=True):
        assert close(value, expected, 1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_without_gradients_a_block_runs_as_it_is(setting: str) -> None:
    block, runner = one_block(SETTINGS[setting])
    block.eval()
    x = torch.randn(8, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(runner(block, x), block(x))
    block.requires_grad_(False)
    assert runner(block, x).grad_fn is None


class Attention(nn.Module):
    """Attention whose scores are larger than their factors, so that they are recomputed."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x


def test_selective_in_a_backward_pass_that_runs_under_autocast() -> None:
    """Recompute without autocast, as plain autograd's backward pass ignores it."""
    found = []
    for run in (run_selectively, plainly):
        x = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = run(Attention(), x).square().sum()  # full precision
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
        found.append(x.grad)
    assert found[0] is not None and found[1] is not None and torch.equal(found[0], found[1])


class Overwrites(nn.Module):
    """Module that saves ``gelu(h)`` as a recipe from ``h``, then overwrites ``h``."""

    def forward(self, x: Tensor) -> Tensor:
        h = x @ x.mT
        y = nn.functional.gelu(h).square()
        with torch.no_grad():
            h.add_(1)
        return y


def test_selective_never_computes_from_what_was_overwritten() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    y = run_selectively(Overwrites(), x)
    with pytest.raises(RuntimeError, match="in-place"):
        y.sum().backward()


def test_selective_has_no_second_derivatives() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    y = run_selectively(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), x).sum()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(y, x, create_graph=True)


MIB = 2**20


class Memory:
    """Run one block of Swin-T's first stage at 224 px, 16 images, on the meta device as CUDA computes it."""

    def __init__(self, efficiency: Efficiency, precision: Any = "bf16-mixed", needs_gradient: bool = True) -> None:
        block = SwinTransformerBlock(96, (56, 56), 3, window_size=7, shift_size=3, drop_path=0.1).to("meta")
        runner = block_runners([block], efficiency)[0]
        x = torch.empty(16, 56, 56, 96, device="meta", requires_grad=needs_gradient)
        tracker = StorageTracker([*block.parameters(), *block.buffers(), x])
        with Emulation("cuda", precision), WorkCounter() as work, tracker:
            persistent = tracker.live_bytes
            y = runner(block, x)
            self.kept = (tracker.live_bytes - persistent) / MIB
            y.backward(torch.empty_like(y))
            self.peak = (tracker.peak_bytes - persistent) / MIB
        self.flops = work.flops
        self.features = x.numel() * x.element_size() / MIB


def test_memory_of_a_block() -> None:
    plain, selective, checkpoint = Memory(Efficiency()), Memory(SETTINGS["selective"]), Memory(SETTINGS["checkpoint"])
    assert selective.kept < 0.5 * plain.kept and selective.peak < 0.8 * plain.peak
    assert selective.flops < 1.02 * plain.flops
    assert checkpoint.kept == pytest.approx(plain.features, rel=0.01)  # the output
    assert checkpoint.peak == pytest.approx(plain.peak, rel=0.01)  # one block by itself: no gain but what it keeps
    assert checkpoint.flops == pytest.approx(4 / 3 * plain.flops, rel=0.01)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("slices", [4, 8])
def test_memory_of_a_block_in_slices(slices: int, precision: str) -> None:
    """Hold the output and both gradients whole, the rest for one slice; less by the input's gradient without it."""
    plain = Memory(Efficiency(), precision)
    efficiency = Efficiency(recompute="checkpoint", slices=slices)
    whole = 3 * plain.features
    assert Memory(efficiency, precision).peak <= whole + 1.15 * plain.peak / slices
    first = Memory(efficiency, precision, needs_gradient=False)
    assert first.peak <= whole - plain.features + 1.15 * plain.peak / slices


def test_on_meta_a_block_is_computed_again_under_autocast() -> None:
    for setting in ("checkpoint", "3 slices"):
        mixed, full = Memory(SETTINGS[setting]).peak, Memory(SETTINGS[setting], "32-true").peak
        assert mixed < 0.8 * full


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_backward_pass_leaves_nothing_behind(setting: str) -> None:
    block, runner = one_block(SETTINGS[setting])
    x = torch.randn(8, 16, 16, 16, requires_grad=True)
    with StorageTracker() as tracker:
        y = runner(block, x).sum()
        alive = tracker.live_bytes
        torch.autograd.grad(y, x, retain_graph=True)
        assert tracker.live_bytes - alive < 8192  # far less than one feature map

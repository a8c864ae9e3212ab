"""Fused window attention compared with timm's: outputs, gradients and memory kept for the backward pass."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block, WindowAttention
from torch import Tensor, nn

from localfeat.efficiency import window_attention
from localfeat.efficiency.settings import Efficiency
from localfeat.efficiency.window_attention import (
    FusedCosineWindowAttention,
    FusedWindowAttention,
    fuse_window_attention,
)
from localfeat.memory.tracker import StorageTracker
from localfeat.utils.errors import UserError
from tests.helpers.small import backbone, batch, disturbed, gradients, learner

BLOCKS = {"swin": SwinTransformerBlock, "swinv2": SwinTransformerV2Block}
FUSED = {"swin": FusedWindowAttention, "swinv2": FusedCosineWindowAttention}
each_family = pytest.mark.parametrize("family", BLOCKS)
each_shift = pytest.mark.parametrize("shift", [0, 2])


@pytest.fixture(autouse=True)
def several_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small networks slice the batch too."""
    monkeypatch.setattr(window_attention, "SMALLEST_SLICE", 256)


def pair(family: str, shift: int, size: int = 8, dim: int = 12, heads: int = 3) -> tuple[nn.Module, nn.Module]:
    """Return one block as timm runs it, and the same fused; windows of 4 x 4 tokens on a size x size grid."""
    torch.manual_seed(0)
    plain = disturbed(BLOCKS[family](dim, (size, size), num_heads=heads, window_size=4, shift_size=shift))
    fused = copy.deepcopy(plain)
    fused.attn.__class__ = FUSED[family]
    return plain, fused


def outcome(block: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the output and all gradients; the backward pass runs outside autocast."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = block(x)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    (y * weights).sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in block.parameters())
    return {"output": y.detach(), "input": x.grad, **gradients(block)}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the norm of the difference relative to the expected tensor's norm."""
    return {name: float((found[name] - e).double().norm() / e.double().norm()) for name, e in expected.items()}


@each_family
@each_shift
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("images", [1, 5])
def test_output_and_every_gradient_are_timms(
    family: str, shift: int, dtype: torch.dtype, tolerance: float, images: int
) -> None:
    plain, fused = (block.to(dtype) for block in pair(family, shift))
    x = torch.randn(images, 8, 8, 12, dtype=dtype)
    found, expected = outcome(fused, x), outcome(plain, x)
    assert found["output"].dtype == dtype
    assert max(error(found, expected).values()) < tolerance


@each_family
@each_shift
def test_under_autocast_it_is_as_near_to_float32_as_timms(family: str, shift: int) -> None:
    plain, fused = pair(family, shift)
    x = torch.randn(4, 8, 8, 12)
    exact = outcome(copy.deepcopy(plain), x)
    theirs, ours = (error(outcome(block, x, torch.bfloat16), exact) for block in (plain, fused))
    for name, theirs_of in theirs.items():
        assert ours[name] < max(2 * theirs_of, 0.02), name


@each_family
def test_one_slice_or_many_are_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = pair(family, shift=2)
    x = torch.randn(6, 8, 8, 12)
    results = []
    for most in (1, 2, 100):  # 100: one image each
        monkeypatch.setattr(window_attention, "MOST_SLICES", most)
        results.append(outcome(copy.deepcopy(fused), x))
    for other in results[1:]:
        assert max(error(other, results[0]).values()) < 1e-5


def test_swinv2_with_its_bias_added_apart_and_without_bias() -> None:
    for changes in ({"qkv_bias_separate": True}, {"qkv_bias": False}):
        plain = disturbed(WindowAttention(12, (4, 4), 3, **changes))
        fused = copy.deepcopy(plain)
        fused.__class__ = FusedCosineWindowAttention
        x = torch.randn(6, 16, 12)
        assert max(error(outcome(fused, x), outcome(plain, x)).values()) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(fused(x), plain(x), atol=0.05, rtol=0.05)


def test_a_head_wider_than_its_share_and_frozen_biases() -> None:
    torch.manual_seed(0)
    plain = SwinTransformerBlock(12, (8, 8), num_heads=3, head_dim=6, window_size=4)
    plain.attn.relative_position_bias_table.requires_grad_(False)
    fused = copy.deepcopy(plain)
    fused.attn.__class__ = FusedWindowAttention
    x = torch.randn(2, 8, 8, 12)
    for block in (plain, fused):
        block(x).square().sum().backward()
    assert fused.attn.relative_position_bias_table.grad is None
    assert max(error(gradients(fused.attn.qkv), gradients(plain.attn.qkv)).values()) < 1e-5


def kept(block: nn.Module, x: Tensor, autocast: bool) -> tuple[int, int]:
    """Return the bytes alive after forward and the peak of forward and backward, beyond those alive before."""
    with StorageTracker([*block.parameters(), *block.buffers(), x]) as tracker:
        persistent = tracker.live_bytes
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block(x)
        after = tracker.live_bytes - persistent
        y.sum().backward()
    return after, tracker.peak_bytes - persistent


@each_family
@each_shift
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_no_attention_matrix_is_kept(family: str, shift: int, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return the exact bytes per window by the difference of two batches, in which biases and weights cancel."""
    monkeypatch.setattr("localfeat.memory.tracker.BLOCK_BYTES", 1)
    heads, dim, tokens = 3, 12, 16
    mask = pair(family, 2)[0].attn_mask if shift else None
    per_window = []
    for block in pair(family, shift):
        attention = block.attn
        attention.forward = lambda x, run=attention.forward: run(x, mask)
        small, large = (kept(attention, torch.randn(n, tokens, dim, requires_grad=True), autocast) for n in (32, 64))
        per_window.append([(more - less) / 32 for less, more in zip(small, large, strict=True)])
    (theirs, their_peak), (ours, our_peak) = per_window
    matrix = heads * tokens**2 * 4  # probabilities, float32
    assert theirs - ours >= matrix
    assert our_peak < their_peak - matrix
    width, copies = (2, 1) if autocast else (4, 0)  # autocast keeps a copy of x
    assert ours == tokens * dim * (3 + 1 + 1 + copies) * width  # q, k, v; the projection's input; the output


@each_family
@pytest.mark.parametrize("method", ["e2e", "feature_recon"])
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.3])
def test_a_learner_has_the_same_losses_and_gradients(family: str, method: str, drop_path_rate: float) -> None:
    results = []
    for efficiency in (Efficiency(), Efficiency(fused_attention=True)):
        model = learner(method, 2, family, drop_path_rate=drop_path_rate, efficiency=efficiency)
        disturbed(model)
        kinds = {type(module) for module in model.backbone.modules()}
        assert (FUSED[family] in kinds) == efficiency.fused_attention
        losses: list[float] = []

        def backward(loss: Tensor, losses: list[float] = losses) -> None:
            losses.append(float(loss.detach()))
            loss.backward()

        torch.manual_seed(5)
        model.train_modules(lambda: batch(8), backward, lambda index: None)
        results.append((losses, gradients(model), list(model.state_dict())))
    (losses, plain, keys), (fused_losses, fused, fused_keys) = results
    assert fused_losses == pytest.approx(losses, rel=1e-5)
    assert fused_keys == keys
    for name, expected in plain.items():
        torch.testing.assert_close(fused[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-7)


@each_family
def test_copies_pickles_evaluation_and_twice_fused(family: str) -> None:
    network: Any = disturbed(backbone(family))
    images, _ = batch(2)
    keys, text = list(network.state_dict()), [name for name, _ in network.named_modules()]
    with torch.no_grad():
        expected = network.eval()(images)
        fuse_window_attention(network)
        fuse_window_attention(network)
        twin = copy.deepcopy(network)
        read = pickle.loads(pickle.dumps(network))
        for model in (network, twin, read):
            torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
            assert list(model.state_dict()) == keys and [name for name, _ in model.named_modules()] == text
        for parameter in network.parameters():
            parameter.zero_()
        torch.testing.assert_close(twin(images), expected, atol=1e-4, rtol=1e-4)  # it has its own parameters
    assert {type(m) for m in twin.modules() if hasattr(m, "logit_scale") or hasattr(m, "window_area")} > {FUSED[family]}


@each_family
def test_without_data_on_the_meta_device(family: str) -> None:
    _, block = pair(family, shift=2)
    block = block.to("meta")
    x = torch.empty(4, 8, 8, 12, device="meta", requires_grad=True)
    block(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.shape == p.shape for p in block.parameters())


def test_attention_dropout_is_refused() -> None:
    with pytest.raises(UserError, match=r"efficiency.fused_attention=true needs .*attn_drop_rate 0, .*0\.25"):
        learner(changes={"attn_drop_rate": 0.25}, efficiency=Efficiency(fused_attention=True))


@pytest.mark.parametrize("family", ["vit", "convnext", "resnet"])
def test_other_families_are_left_alone(family: str) -> None:
    network = backbone(family)
    before = [type(module) for module in network.modules()]
    fuse_window_attention(network)
    assert [type(module) for module in network.modules()] == before

"""The fused second half of an MLP compared with timm's: outputs, gradients and memory of the backward pass."""

from __future__ import annotations

import copy
import pickle
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import timm
import torch
from timm.layers import GlobalResponseNormMlp, GluMlp, Mlp
from torch import Tensor, nn

from localfeat.backbones.decompose import decompose
from localfeat.efficiency import fused_mlp
from localfeat.efficiency.fused_mlp import FusedMlp, activations_computed_again, fuse_mlps
from localfeat.efficiency.recompute import block_runners
from localfeat.efficiency.settings import Efficiency
from localfeat.memory.emulation import Emulation
from localfeat.memory.tracker import StorageTracker
from tests.helpers.small import IMAGE_SIZE, backbone, batch, disturbed, gradients

FAMILIES = ["swin", "swinv2", "vit", "convnext"]
C, H = 12, 48
how = pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])


@pytest.fixture(autouse=True)
def several_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small networks slice the batch too, with a shorter last slice."""
    monkeypatch.setattr(fused_mlp, "SMALLEST_SLICE", 256)


def context(again: bool) -> AbstractContextManager[None]:
    return activations_computed_again() if again else nullcontext()


def pair(**arguments: Any) -> tuple[nn.Module, nn.Module]:
    """Return one MLP as timm runs it, and the same one fused."""
    torch.manual_seed(0)
    plain = disturbed(nn.ModuleList([Mlp(C, H, **arguments)]))
    fused = copy.deepcopy(plain)
    fuse_mlps(fused)
    assert type(fused[0]) is FusedMlp
    return plain[0], fused[0]


def outcome(block: nn.Module, x: Tensor, autocast: torch.dtype | None = None, again: bool = False) -> dict[str, Tensor]:
    """Return the output and all gradients; the backward pass runs outside autocast."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None), context(again):
        y = block(x)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    (y * weights).sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in block.parameters())
    return {"output": y.detach(), "input": x.grad, **gradients(block)}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest norm of a difference, relative to the expected tensor's norm."""
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == e.dtype for name, e in expected.items())
    return max(float((found[name] - e).double().norm() / e.double().norm()) for name, e in expected.items())


@how
@pytest.mark.parametrize(
    "arguments", [{}, {"act_layer": timm.layers.GELU}, {"act_layer": timm.layers.GELUTanh}, {"bias": (True, False)}]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 7, C), (3, C), (C,), (2, 4, 5, C)], ids=str)
def test_output_and_every_gradient_are_timms(
    arguments: dict[str, Any], dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], again: bool
) -> None:
    plain, fused = (mlp.to(dtype) for mlp in pair(**arguments))
    x = torch.randn(shape, dtype=dtype)
    assert error(outcome(fused, x, again=again), outcome(plain, x)) < tolerance


def test_torchs_approximate_gelu() -> None:
    plain, fused = pair()
    plain.act, fused.act = nn.GELU("tanh"), nn.GELU("tanh")
    x = torch.randn(4, C)
    assert error(outcome(fused, x), outcome(plain, x)) < 1e-6


@how
def test_memory_in_another_order(again: bool) -> None:
    """Use a convolution's features, viewed channels last, and a gradient that is not contiguous."""
    plain, fused = pair()
    x = torch.randn(3, C, 5, 6).permute(0, 2, 3, 1)
    found = []
    for mlp in (plain, fused):
        mine = x.clone().requires_grad_()
        with context(again):
            y = mlp(mine)
        y.permute(0, 3, 1, 2).mul(torch.arange(6.0)).sum().backward()
        found.append({"input": mine.grad, **gradients(mlp)})
    assert error(found[1], found[0]) < 1e-5


@how
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_the_numbers_are_timms(again: bool, dtype: torch.dtype) -> None:
    """Compare up to rounding by the order of summation; dtypes match timm's."""
    plain, fused = pair()
    x = torch.randn(40, C)
    found, expected = outcome(fused, x, dtype, again), outcome(plain, x, dtype)
    assert found["output"].dtype == dtype and found["fc2.weight"].dtype == torch.float32
    assert error(found, expected) < 1e-2
    assert torch.equal(found["output"], expected["output"])
    assert torch.equal(found["input"], expected["input"])


def test_slices_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum in at least float32: a sum of ones would stop at 256 in bfloat16."""
    monkeypatch.setattr(fused_mlp, "MOST_SLICES", 1000)
    monkeypatch.setattr(fused_mlp, "SMALLEST_SLICE", 1)
    given, hidden = (torch.ones(1000, width, dtype=torch.bfloat16) for width in (C, H))
    found = fused_mlp._over_slices(given, hidden, "none")
    assert found.dtype == torch.bfloat16 and found.shape == (C, H)
    torch.testing.assert_close(found.float(), torch.full((C, H), 841.3), rtol=1e-2, atol=0)


@how
def test_a_backward_pass_under_autocast_is_the_same(again: bool) -> None:
    _, fused = pair()
    results = []
    for autocast in (False, True):
        mlp, x = copy.deepcopy(fused), torch.randn(40, C, generator=torch.Generator().manual_seed(1))
        with context(again):
            y = mlp(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.autograd.backward(y, torch.ones_like(y))
        results.append(mlp.fc2.weight.grad)
    assert torch.equal(results[0], results[1])


@how
@pytest.mark.parametrize(
    "frozen", [["fc2.weight"], ["fc2.bias"], ["fc1.weight", "fc1.bias"], ["fc2.weight", "fc2.bias"]]
)
def test_frozen_parameters(frozen: list[str], again: bool) -> None:
    plain, fused = pair()
    found = []
    for mlp in (plain, fused):
        for name in frozen:
            mlp.get_parameter(name).requires_grad_(False)
        x = torch.randn(40, C, generator=torch.Generator().manual_seed(1))  # needs no gradient
        with context(again):
            mlp(x).square().sum().backward()
        found.append({name: p.grad for name, p in mlp.named_parameters() if p.requires_grad})
    assert error(found[1], found[0]) < 1e-5


@how
def test_a_second_backward_pass_is_refused(again: bool) -> None:
    _, fused = pair()
    x = torch.randn(4, C, requires_grad=True)
    with context(again):
        loss = fused(x).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"efficiency.fused_mlp: the backward pass runs only once: it overwrites"):
        loss.backward()
    (once,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


@how
def test_whoever_else_keeps_the_hidden_layer_is_not_given_wrong_numbers(again: bool) -> None:
    """Overwrite ``h`` by its gradient only if the activation was not saved, and let autograd notice it."""
    _, fused = pair()
    x = torch.randn(4, C, requires_grad=True)
    kept: list[Tensor] = []
    fused.fc1.register_forward_hook(lambda module, args, h: kept.append(h.square()))
    with context(again):
        y = fused(x)
    y.sum().backward(retain_graph=True)
    if again:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept[0].sum().backward()
    else:
        torch.autograd.grad(kept[0].sum(), fused.fc1.weight)


def most(mlp: nn.Module, x: Tensor, again: bool) -> tuple[int, int]:
    """Return the bytes that the forward pass keeps and the backward pass's peak, beyond those alive before."""
    with StorageTracker([*mlp.parameters(), x]) as tracker:
        persistent = tracker.live_bytes
        with context(again):
            y = mlp(x)
        kept = tracker.live_bytes - persistent
        tracker.reset_peak()
        y.backward(torch.ones_like(y))
    return kept, tracker.peak_bytes - persistent


def test_tensors_of_the_hidden_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check kept and peak memory in units of that tensor, exact to the byte by the difference of two batches."""
    monkeypatch.setattr("localfeat.memory.tracker.BLOCK_BYTES", 1)
    plain, fused = pair()
    found = {}
    for name, mlp, again in (("plain", plain, False), ("kept", fused, False), ("again", fused, True)):
        mlp.requires_grad_(True)
        small, large = (most(mlp, torch.randn(rows, C, requires_grad=True), again) for rows in (800, 1600))
        unit = 800 * 4
        found[name] = [(b - a) / unit for a, b in zip(small, large, strict=True)]
    # Output and its gradient are always alive, C wide each; a slice is an eighth.
    assert found["plain"] == [2 * H + C, 3 * H + 2 * C]
    assert found["kept"] == [2 * H + C, 2 * H + H / 8 + 2 * C]
    assert found["again"] == [H + C, H + 2 * H / 8 + 2 * C]


def blocks(family: str, efficiency: Efficiency, dtype: torch.dtype, autocast: bool = False) -> dict[str, Tensor]:
    """Run all blocks of a network, with drop path, once forward and backward."""
    linear = {"conv_mlp": False} if family == "convnext" else {}  # as in ConvNeXt-T and above
    network = disturbed(backbone(family, drop_path_rate=0.3, **linear)).train()
    pieces = decompose(network, IMAGE_SIZE)
    network.to(dtype)
    if efficiency.fused_mlp:
        fuse_mlps(network)
        assert any(type(module) is FusedMlp for module in network.modules())
    torch.manual_seed(5)
    x = pieces.stem(batch()[0].to(dtype)).detach()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for block, run in zip(pieces.blocks, block_runners(pieces.blocks, efficiency), strict=True):
            x = run(block, x)
    x.double().square().mean().backward()
    return {"output": x.detach(), **gradients(nn.ModuleList(pieces.blocks))}


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "selective": {"recompute": "selective"},
    "checkpoint": {"recompute": "checkpoint"},
    "slices": {"recompute": "checkpoint", "slices": 3},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_blocks_of_every_family(family: str, setting: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        found, expected = (
            blocks(family, Efficiency(**s), dtype) for s in ({**SETTINGS[setting], "fused_mlp": True}, {})
        )
        scale = max(float(g.norm()) for g in expected.values())
        for name, e in expected.items():
            assert float((found[name] - e).norm()) <= tolerance * max(float(e.norm()), 1e-3 * scale), name


@pytest.mark.parametrize("setting", SETTINGS)
def test_blocks_in_bfloat16(setting: str) -> None:
    exact, theirs, ours = (
        blocks("vit", Efficiency(**settings), torch.float32, autocast)
        for settings, autocast in (({}, False), ({}, True), ({**SETTINGS[setting], "fused_mlp": True}, True))
    )
    for name, e in exact.items():
        if e.norm() > 1e-3:
            errors = [float((found[name].float() - e).norm() / e.norm()) for found in (theirs, ours)]
            assert errors[1] < max(1.5 * errors[0], 0.02), name


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@how
def test_without_data_in_an_emulation(target: Any, precision: Any, again: bool) -> None:
    """Require the dtypes of timm's MLP on the meta device, where nothing has data."""
    found = []
    for mlp in pair():
        mlp.to("meta")
        x = torch.empty(4, 9, C, device="meta", requires_grad=True)
        with Emulation(target, precision), context(again):
            y = mlp(x)
            y.float().sum().backward()
        found.append([y.dtype, x.grad.dtype, *((p.grad.dtype, p.grad.shape) for p in mlp.parameters())])
    assert found[0] == found[1]


def test_copies_pickles_evaluation_and_twice_fused() -> None:
    network: Any = disturbed(backbone("vit"))
    images, _ = batch(2)
    keys, names = list(network.state_dict()), [name for name, _ in network.named_modules()]
    with torch.no_grad():
        expected = network.eval()(images)
        fuse_mlps(network)
        fuse_mlps(network)
        twin, read = copy.deepcopy(network), pickle.loads(pickle.dumps(network))
        for model in (network, twin, read):
            assert torch.equal(model(images), expected)
            assert sum(type(m) is FusedMlp for m in model.modules()) == 4
            assert list(model.state_dict()) == keys and [name for name, _ in model.named_modules()] == names
    torch.testing.assert_close(twin(images).detach(), expected)  # a graph is built
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(twin(images).detach(), expected)  # it has its own parameters


def test_other_mlps_are_left_alone() -> None:
    class Other(Mlp):
        pass

    hidden = {"in_features": C, "hidden_features": H}
    others = [
        Mlp(**hidden, drop=0.1),
        Mlp(**hidden, drop=(0.0, 0.1)),
        Mlp(**hidden, use_conv=True),
        Mlp(**hidden, act_layer=nn.ReLU),
        Mlp(**hidden, norm_layer=nn.LayerNorm),
        GluMlp(**hidden),
        GlobalResponseNormMlp(**hidden),
        Other(**hidden),
    ]
    before = [type(module) for module in others]
    fuse_mlps(nn.ModuleList(others))
    assert [type(module) for module in others] == before


def test_parameters_are_read_when_it_runs() -> None:
    _, fused = pair()
    x = torch.randn(4, C)
    changed = {name: torch.randn_like(p, requires_grad=True) for name, p in fused.named_parameters()}
    torch.func.functional_call(fused, changed, (x,)).sum().backward()
    assert all(p.grad is not None for p in changed.values())
    assert all(p.grad is None for p in fused.parameters())

"""Modules added up from separately measured pieces against whole steps of the learner's own loop.

The allocator's rounding is switched off. What then differs are scalars: the losses and means that the loop keeps for
its log, and those that the pieces were measured with.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from localfeat.backbones.bare import without_data
from localfeat.efficiency.settings import Efficiency
from localfeat.learner.module import Learner
from localfeat.memory.accounting import step_memory
from localfeat.memory.emulation import Emulation
from localfeat.memory.module_costs import ModuleCosts, Setting
from localfeat.memory.persistent import Keeping, Persistent
from localfeat.methods.base import Method
from localfeat.methods.parts.decoders import as_decoder
from localfeat.methods.registry import METHODS, as_method
from tests.helpers.small import CLASSES, FAMILIES, IMAGE_SIZE, RGB_IMAGE, backbone

SCALARS = 4096  # bytes: losses, means, what small buffers share; the steps take 3 to 20 MiB
SIZE = 16  # images per batch
DEVICES: list[tuple[Any, Any]] = [
    ("cuda", "32-true"),
    ("cuda", "bf16-mixed"),
    ("cpu", "32-true"),
    ("cuda", "16-mixed"),
    ("cpu", "bf16-mixed"),
]
EFFICIENCIES = {
    "none": Efficiency(),
    "lean": Efficiency(fused_attention=True, loss_slices=4),
    "selective": Efficiency(fused_attention=True, loss_slices=4, recompute="selective"),
    "checkpoint": Efficiency(recompute="checkpoint"),
    "slices": Efficiency(fused_attention=True, loss_slices=4, recompute="checkpoint", slices=4),
    "some_blocks": Efficiency(recompute="checkpoint", blocks=[1, 3], slices=2),
    "fused_mlp": Efficiency(fused_attention=True, fused_mlp=True),
}
FIRST = [name for name, method in METHODS.items() if method.by_shapes][:5]
CASES = [
    (family, name, FIRST[number % len(FIRST)], *DEVICES[(number // 2) % len(DEVICES)])
    for number, (family, name) in enumerate((family, name) for family in FAMILIES for name in EFFICIENCIES)
    if (family, EFFICIENCIES[name].slices > 1) != ("resnet", True)  # batch normalisation needs the whole batch
]
CASES += [
    (family, name, method, *DEVICES[number % len(DEVICES)])
    for number, family in enumerate(FAMILIES)
    for method, names in (
        ("greedy_linear", ("none", "checkpoint")),
        ("auglocal", ("lean", "checkpoint")),
        ("trgl", ("none", "lean")),
        ("lookahead", ("none", "lean")),
    )
    for name in names
]


@pytest.fixture(autouse=True)
def exact_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localfeat.memory.tracker.BLOCK_BYTES", 1)


def costs(family: str, setting: Setting, known: dict[object, Any] | None = None) -> ModuleCosts:
    return ModuleCosts(without_data(backbone(family, drop_path_rate=0.1)), setting, known)


def setting(method: str | Method, efficiency: Efficiency, target: Any = "cuda", precision: Any = "32-true") -> Setting:
    device = lambda: Emulation(target, precision)  # noqa: E731
    how = as_method(method) if isinstance(method, str) else method
    pixels = 3 * IMAGE_SIZE**2
    keeping = Keeping(fused_optimizer=precision != "16-mixed" or target == "cpu")  # under a loss scale it is not
    return Setting(how, as_decoder("one_layer"), SIZE, device, efficiency, IMAGE_SIZE, pixels, keeping=keeping)


def composed(costs: ModuleCosts, cuts: list[int]) -> list[float]:
    """The peak in every module."""
    modules = [costs.module(*edges) for edges in pairwise([0, *cuts, costs.blocks])]
    persistent = costs.persistent.total + sum(module.persistent for module in modules)
    return [persistent + module.peak for module in modules]


def true(family: str, cuts: list[int], chosen: Setting, target: Any, precision: Any, **more: Any) -> Any:
    network = backbone(family, drop_path_rate=0.1)
    learner = Learner(
        network, chosen.method, cuts or 1, chosen.decoder, efficiency=chosen.efficiency, image_size=IMAGE_SIZE
    )
    values = {"batch_size": SIZE, "source": RGB_IMAGE, **more}
    return step_memory(learner, image_size=IMAGE_SIZE, target=target, precision=precision, **values)


def compare(found: list[float], step: Any, above: float = 0.0) -> None:
    """Equal up to scalars, or too large by a share of the step."""
    for ours, module in zip(found, step.modules, strict=True):
        excess = ours - module.peak_bytes
        assert -SCALARS <= excess <= SCALARS + above * module.peak_bytes


@pytest.mark.parametrize(
    ("family", "name", "method", "target", "precision"),
    [case if number % 14 == 1 else pytest.param(*case, marks=pytest.mark.slow) for number, case in enumerate(CASES)],
)
def test_every_module_of_a_true_step(family: str, name: str, method: str, target: Any, precision: Any) -> None:
    chosen = setting(method, EFFICIENCIES[name], target, precision)
    measured = costs(family, chosen)
    for cuts in [[1, 2, 3], [measured.blocks // 2]] if chosen.method.local else [[]]:
        # what the optimizer makes under a loss scale is an upper bound
        above = 0.03 if (target, precision) == ("cuda", "16-mixed") else 0.0
        compare(composed(measured, cuts), true(family, cuts, chosen, target, precision), above)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_is_the_steps_weights_and_optimizer_states(family: str) -> None:
    chosen = setting("feature_recon", Efficiency())
    measured = costs(family, chosen)
    edges = list(pairwise([0, 1, 3, measured.blocks]))
    found = measured.persistent.total + sum(measured.module(*edge).persistent for edge in edges)
    shares = true(family, [1, 3], chosen, "cuda", "32-true").total
    assert found == shares.weights + shares.optimizer_state


def test_frozen_parameters_have_no_optimizer_state() -> None:
    network = backbone()
    everything = Persistent.of(network)
    for parameter in network.layers.parameters():
        parameter.requires_grad_(False)
    frozen = sum(8 * p.numel() + 4 for p in network.layers.parameters())
    assert Persistent.of(network) == (everything.weights, everything.optimizer_state - frozen, 0)


@pytest.mark.parametrize(
    ("method", "cuts", "family"),
    [("feature_recon", [2], "swin"), ("image_recon", [1, 3], "vit"), ("e2e", [], "swin")],
)
def test_accumulation_and_average(method: str, cuts: list[int], family: str) -> None:
    """The gradients of all modules stand there. A piece's count once more as new ones: much of so small a network."""
    chosen = replace(setting(method, Efficiency()), keeping=Keeping(accumulates=True, ema=True))
    measured = costs(family, chosen)
    found, step = composed(measured, cuts), true(family, cuts, chosen, "cuda", "32-true", accumulate=2, ema=True)
    compare(found, step, above=0.2)
    assert max(composed(costs(family, replace(chosen, keeping=Keeping())), cuts)) < 0.95 * step.peak_bytes


def test_soft_labels() -> None:
    chosen = replace(setting("greedy_ce", Efficiency()), soft_labels=True)
    compare(composed(costs("vit", chosen), [2]), true("vit", [2], chosen, "cuda", "32-true", soft_labels=True))


@pytest.mark.parametrize("decoder", ["interp", "deconv"])
def test_other_decoders(decoder: str) -> None:
    chosen = replace(setting("image_recon", Efficiency(loss_slices=2)), decoder=as_decoder(decoder))
    compare(composed(costs("swin", chosen), [1, 3]), true("swin", [1, 3], chosen, "cuda", "32-true"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["swin", "resnet"])
def test_shared_measurements_are_those_of_instances_of_their_own(family: str) -> None:
    """What one method, setting or batch size has measured is never taken for another's."""
    known: dict[object, Any] = {}
    networks = {}
    for efficiency in [EFFICIENCIES[name] for name in ("none", "lean", "selective", "checkpoint", "fused_mlp")]:
        for method in ("feature_recon", "greedy_ce"):
            for size in (8, 16):
                chosen = replace(setting(method, efficiency, precision="bf16-mixed"), batch_size=size)
                fused = efficiency.fused_attention, efficiency.fused_mlp
                network = networks.setdefault(fused, without_data(backbone(family, drop_path_rate=0.1)))
                shared = ModuleCosts(network, chosen, known)
                if size == 8 and method != "feature_recon":  # measured for the others to find
                    shared.module(0, 2)
                    continue
                own = costs(family, chosen)
                for edge in [(0, 2), (1, 3), (2, own.blocks)]:
                    assert shared.module(*edge) == own.module(*edge)


def test_work_of_a_known_network() -> None:
    """Two FLOPs per multiply-add; a linear layer's backward pass has two products more."""
    chosen = setting("greedy_ce", Efficiency())
    measured = costs("vit", chosen)
    tokens, width = (IMAGE_SIZE // 8) ** 2 + 1, 32
    linear = 12 * width * width  # weights of a block: qkv, projection, MLP of four times the width
    attention = 2 * 2 * tokens**2 * width  # scores and their products with the values
    forward = SIZE * (2 * tokens * linear + attention)
    block = measured.module(1, 3).flops - measured.module(2, 3).flops
    assert 3 * forward <= block <= 3.3 * forward  # a fused attention's backward pass makes its scores again
    again = costs("vit", setting("greedy_ce", Efficiency(recompute="checkpoint")))
    recomputed = again.module(1, 3).flops - again.module(2, 3).flops
    assert recomputed - block == pytest.approx(forward, rel=0.02)
    assert block > CLASSES * SIZE

"""Blocks that are computed again give the plain run's results, and keep less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localfeat.efficiency import Efficiency
from localfeat.errors import UserError
from localfeat.network import block_runners, decompose
from localfeat.network.local_module import plainly
from tests.small import IMAGE_SIZE, backbone, batch, disturbed, gradients

FAMILIES = ["swin", "swinv2", "vit", "convnext", "resnet"]
SETTINGS = {"checkpoint": Efficiency(recompute="checkpoint")}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_setting = pytest.mark.parametrize("setting", SETTINGS)


class Run:
    """All blocks once forward and backward: output, gradients, random state and buffers afterwards."""

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
    """Norm of the difference relative to that of the expected tensor: single elements may be tiny sums."""
    return bool((value - expected).norm() <= rtol * expected.norm() + 1e-7)


@each_family
@each_setting
def test_results_are_those_of_the_plain_run(setting: str, family: str) -> None:
    assert_same(Run(family, SETTINGS[setting]), Run(family, Efficiency()))


@pytest.mark.parametrize("family", ["swin", "vit", "resnet"])
@each_setting
def test_results_are_those_of_the_plain_run_in_bfloat16(setting: str, family: str) -> None:
    assert_same(Run(family, SETTINGS[setting], torch.bfloat16), Run(family, Efficiency(), torch.bfloat16), rtol=2e-2)


@each_setting
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

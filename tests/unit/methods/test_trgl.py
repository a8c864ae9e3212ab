"""trgl: the numbers of its card, its branches against blocks written out, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from localfeat.efficiency.settings import Efficiency
from localfeat.learner.module import Learner
from localfeat.methods.parts.watched import mean_square
from localfeat.utils.errors import UserError
from tests.helpers.small import batch, disturbed, learner


def test_numbers_of_the_card() -> None:
    r1 = (torch.arange(24, dtype=torch.float64) + 1).sin().reshape(2, 3, 4)
    r2 = 0.5 * r1 + 0.1
    assert float(mean_square(r1) + mean_square(r2)) == pytest.approx(0.6630883824, rel=1e-6)
    assert float(mean_square(r1) + mean_square(r2)) / 20 == pytest.approx(0.0331544191, rel=1e-6)


def residuals(family: str, block: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Residual branches of a block, written out."""
    if family == "resnet":
        branch = block.bn2(block.conv2(block.act1(block.bn1(block.conv1(x)))))
        return [branch]
    if isinstance(block, torch.nn.Sequential):
        x, block = block[0](x), block[1]
    attention = block.attn if family == "vit" else block._attn
    first = attention(block.norm1(x))
    second = block.mlp(block.norm2(x + first))
    return [first, second]


@pytest.mark.parametrize("family", ["swin", "vit", "resnet"])
def test_every_module_adds_the_mean_squares_of_its_branches(family: str) -> None:
    model = learner("trgl", 2, family)
    disturbed(model.backbone)
    images, labels = batch()
    x = images
    for module in model.local_modules:
        output = module(x, images, labels)
        own = list(module.blocks.parameters())
        h = x if module.stem is None else module.stem(x)
        expected = torch.zeros(())
        for block in module.blocks:
            expected = expected + sum(r.square().mean() for r in residuals(family, block, h))
            h = block(h)
        assert module.objective.weights["transport"] == 1 / 20
        torch.testing.assert_close(output.terms["transport"], expected.detach(), rtol=1e-5, atol=1e-6)
        module.objective.weights = {"cross_entropy": 0.0, "transport": 1.0}
        found = torch.autograd.grad(module(x, images, labels).loss, own, allow_unused=True, materialize_grads=True)
        wanted = torch.autograd.grad(expected, own, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        x = output.features


@pytest.mark.parametrize(
    "efficiency", [Efficiency(recompute="checkpoint", slices=2), Efficiency(recompute="selective")]
)
def test_branches_that_are_computed_again_are_refused(efficiency: Efficiency) -> None:
    with pytest.raises(UserError, match="method=trgl reads residual branches") as error:
        learner("trgl", 2, efficiency=efficiency)
    assert "\n" not in str(error.value)


def test_a_network_without_residual_branches_is_refused() -> None:
    network = timm.create_model("vgg11", num_classes=3)
    with pytest.raises(UserError, match=r"^method=trgl reads residual branches, and none are found in this backbone"):
        Learner(network, "trgl", 2, image_size=64)


def test_a_module_without_a_branch_has_no_transport() -> None:
    network = timm.create_model("efficientnet_b0", num_classes=3)
    model = Learner(network, "trgl", [1, 2, 3, 4, 5], image_size=64)
    terms = [set(module.objective.weights) for module in model.local_modules]
    assert {"cross_entropy"} in terms and {"cross_entropy", "transport"} in terms
    images = torch.randn(2, 3, 64, 64)
    for module in model.local_modules:
        output = module(images, images, torch.tensor([0, 1]))
        output.loss.backward()
        images = output.features


def test_the_branch_ends_after_attention_over_channels() -> None:
    network = timm.create_model("seresnet18", num_classes=3)
    model = Learner(network, "trgl", 2, image_size=64)
    watched = model.local_modules[0].objective.watched
    assert watched is not None
    assert {type(end).__name__ for end in watched.modules} == {"SEModule"}

"""lopt: the number of its card, and features of any ratio."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from localfeat.backbones.layout import FeatureShape
from localfeat.methods.objectives.bottleneck import InputObjective
from tests.helpers.small import batch, learner


def pattern(*shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float64) + 1).sin().reshape(shape)


def test_number_of_the_card() -> None:
    shape = FeatureShape("NLC", 8, 2, 2)
    objective = InputObjective(shape, shape, 10.0).double()
    with torch.no_grad():
        objective.down.weight.copy_(0.1 * pattern(2, 8))
        objective.up.weight.copy_(0.1 * pattern(8, 2))
    terms, _ = objective(0.7 * pattern(2, 4, 8), pattern(2, 4, 8), None, torch.zeros(2))
    assert float(terms["reconstruction"]) == pytest.approx(0.2437670871, rel=1e-6)
    assert objective.weights == {"reconstruction": 10.0}


@pytest.mark.parametrize("family", ["swin", "vit", "resnet"])
def test_the_loss_written_out(family: str) -> None:
    model = learner("lopt", 2, family)
    images, labels = batch()
    module = model.local_modules[0]
    objective = module.objective
    output = module(images, images, labels)
    inputs = module.stem(images)
    h, z = objective.outputs.to_nhwc(module.blocks(inputs)), objective.inputs.to_nhwc(inputs.detach())
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    h = h * objective.norm.weight + objective.norm.bias
    h = F.gelu(h @ objective.down.weight.T + objective.down.bias) @ objective.up.weight.T + objective.up.bias
    r, channels = objective.upscale, z.shape[-1]

    def pixel(y: int, x: int) -> torch.Tensor:
        at = ((y % r) * r + x % r) * channels
        return h[:, y // r, x // r, at : at + channels]

    rows = [torch.stack([pixel(y, x) for x in range(z.shape[2])], 1) for y in range(z.shape[1])]
    rebuilt = torch.stack(rows, 1)
    assert rebuilt.shape[-1] == channels
    expected = 10 * (rebuilt - z).square().mean()
    torch.testing.assert_close(output.loss, expected)
    own = [*module.blocks.parameters(), *objective.parameters()]
    found = torch.autograd.grad(output.loss, own, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, own, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_maps_whose_sides_have_no_whole_ratio() -> None:
    objective = InputObjective(FeatureShape("NCHW", 8, 3, 4), FeatureShape("NCHW", 5, 7, 7), 1.0)
    terms, _ = objective(torch.randn(2, 5, 7, 7), torch.randn(2, 8, 3, 4), None, torch.zeros(2))
    assert objective.upscale == 3 and terms["reconstruction"].isfinite()


def test_the_input_is_no_task_and_gets_no_gradient() -> None:
    model = learner("lopt", 2, "vit")
    images, labels = batch()
    output = model.local_modules[0](images, images, labels)
    assert set(output.terms) == {"reconstruction"} and output.logits is None
    assert set(model.local_modules[1].objective.weights) == {"cross_entropy"}

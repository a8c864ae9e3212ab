"""dgl: the sizes of its card, and its head against one written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from localfeat.backbones.layout import FeatureShape
from localfeat.methods.parts.heads import PooledMlp
from localfeat.methods.registry import METHODS
from localfeat.utils.errors import UserError
from tests.helpers.small import CLASSES, batch, learner


@pytest.mark.parametrize(("side", "pooled"), [(32, 8), (14, 4), (7, 2), (4, 1), (1, 1)])
def test_sides_of_the_card(side: int, pooled: int) -> None:
    head = PooledMlp(FeatureShape("NCHW", 3, side, side), 2)
    seen: list[torch.Size] = []
    head[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert head(torch.randn(2, 3, side, side)).shape == (2, 2)
    assert seen == [(2, 3, pooled, pooled)]


@pytest.mark.parametrize("family", ["swin", "vit", "resnet"])
def test_the_head_written_out(family: str) -> None:
    model = learner("dgl", 2, family)
    images, labels = batch(6)
    module = model.local_modules[0]
    output = module(images, images, labels)
    shape = module.objective.head.shape
    x = shape.to_nchw(module.blocks(module.stem(images)))
    rows, columns = -(-shape.height // 4), -(-shape.width // 4)
    x = F.adaptive_avg_pool2d(x, (rows, columns))
    weights = [p for n, p in module.objective.head.named_parameters()]
    for number in range(3):
        kernel, scale, shift = weights[3 * number : 3 * number + 3]
        x = torch.einsum("bchw,dc->bdhw", x, kernel[:, :, 0, 0])
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]
        x = x.clamp(min=0)
    x = F.adaptive_avg_pool2d(x, 2).flatten(1)
    for number in range(3):
        matrix, bias, scale, shift = weights[9 + 4 * number : 13 + 4 * number]
        x = x @ matrix.T + bias
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * scale + shift
        x = x.clamp(min=0)
    matrix, bias = weights[-2:]
    expected = F.cross_entropy(x @ matrix.T + bias, labels)
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)
    own = [*module.blocks.parameters(), *weights]
    found, wanted = torch.autograd.grad(output.loss, own), torch.autograd.grad(expected, own)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-4)


def test_a_batch_of_one_is_refused_in_one_line() -> None:
    assert METHODS["dgl"].fewest_images == 2
    head = PooledMlp(FeatureShape("NCHW", 3, 4, 4), CLASSES)
    with pytest.raises(UserError, match=r"^a batch of 1: this head's BatchNorm needs two images; drop_last=True"):
        head(torch.randn(1, 3, 4, 4))
    assert head.eval()(torch.randn(1, 3, 4, 4)).shape == (1, CLASSES)

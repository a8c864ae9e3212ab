"""predsim: the numbers of its card, and its loss against one written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from localfeat.methods.objectives.similarity import similarity, similarity_loss
from localfeat.methods.registry import METHODS
from tests.helpers.small import CLASSES, batch, learner


def test_numbers_of_the_card() -> None:
    x = (torch.arange(80, dtype=torch.float64) + 1).sin().reshape(4, 5, 2, 2)
    labels = torch.tensor([0, 1, 1, 2])
    assert float(similarity(x)[0, 3]) == pytest.approx(0.8079880, abs=1e-6)
    assert float(similarity_loss(x, labels, 3)) == pytest.approx(0.6071565379, rel=1e-6)
    wanted = similarity(F.one_hot(labels, 3).double())
    expected = torch.full((4, 4), -1 / 2, dtype=torch.float64)
    expected[torch.eye(4, dtype=torch.bool)] = 1
    expected[1, 2] = expected[2, 1] = 1
    torch.testing.assert_close(wanted, expected, atol=1e-6, rtol=0)


def test_a_constant_map_has_a_finite_gradient() -> None:
    x = torch.ones(3, 4, 2, 2, requires_grad=True)
    similarity_loss(x, torch.tensor([0, 1, 1]), 2).backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("family", ["swin", "vit", "resnet"])
def test_the_loss_written_out(family: str) -> None:
    model = learner("predsim", 2, family)
    images, labels = batch(6)
    first, last = model.local_modules
    objective = first.objective
    assert not objective.fc.weight.any() and not objective.fc.bias.any()
    with torch.no_grad():
        objective.fc.weight.normal_()
    output = first(images, images, labels)
    x = objective.shape.to_nchw(first.blocks(first.stem(images)))
    logits = x.mean((2, 3)) @ objective.fc.weight.T + objective.fc.bias
    maps = F.conv2d(x, objective.conv.weight, padding=1)
    deviations = [[(maps[i, c] - maps[i, c].mean()).square().sum() for c in range(x.shape[1])] for i in range(6)]
    pixels = x.shape[2] * x.shape[3]
    vectors = torch.stack([torch.stack([(d / (pixels - 1) + 1e-8).sqrt() for d in row]) for row in deviations])
    total = torch.zeros(())
    for i in range(6):
        for j in range(6):
            cosine = F.cosine_similarity(vectors[i] - vectors[i].mean(), vectors[j] - vectors[j].mean(), dim=0)
            wanted = 1.0 if labels[i] == labels[j] else -1 / (CLASSES - 1)
            total = total + (cosine - wanted) ** 2 / 36
    expected = 0.01 * F.cross_entropy(logits, labels) + 0.99 * total
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)
    own = [*first.blocks.parameters(), *objective.parameters()]
    found, gradients = torch.autograd.grad(output.loss, own), torch.autograd.grad(expected, own)
    torch.testing.assert_close(found, gradients, rtol=1e-2, atol=1e-4)
    assert last.objective.weights == {"cross_entropy": pytest.approx(0.01)}
    assert METHODS["predsim"].fewest_images == 2 and not METHODS["predsim"].contrasts

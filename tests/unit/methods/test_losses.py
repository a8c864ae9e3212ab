"""Every loss against its formula written out by hand, forward and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from localfeat.methods.parts.losses import RECONSTRUCTION_LOSSES, supervised_nt_xent


def nt_xent_by_loops(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Khosla et al. 2020, eq. 2, with one view: sums over single pairs."""
    lengths = [(e * e).sum().sqrt() for e in embeddings]
    z = [e / n for e, n in zip(embeddings, lengths, strict=True)]
    per_image = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        if not positives:
            continue
        logits = {a: (z[i] * z[a]).sum() / temperature for a in others}
        top = max(float(value.detach()) for value in logits.values())
        log_sum = top + sum((value - top).exp() for value in logits.values()).log()
        per_image.append(-sum(logits[p] - log_sum for p in positives) / len(positives))
    return sum(per_image) / len(per_image)


def both(function: Callable[..., Tensor], variable: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    variable = variable.clone().requires_grad_()
    value = function(variable, *others)
    return value.detach(), torch.autograd.grad(value, variable)[0]


@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
@pytest.mark.parametrize(
    "labels",
    [[0, 1, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 4]],
    ids=["classes of 3, 2 and 1", "one class only", "one pair"],
)
def test_contrast_is_the_loop_over_pairs(labels: list[int], temperature: float) -> None:
    embeddings = torch.randn(6, 4, dtype=torch.float64) * 3
    expected = both(nt_xent_by_loops, embeddings, torch.tensor(labels), temperature)
    actual = both(supervised_nt_xent, embeddings, torch.tensor(labels), temperature)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert actual[0] > 0
    assert actual[1].abs().max() > 1e-6


def test_contrast_of_orthogonal_pairs_is_known() -> None:
    """Two pairs of equal vectors at right angles: -log(e^(1/T) / (e^(1/T) + 2))."""
    embeddings = torch.tensor([[2.0, 0.0], [0.5, 0.0], [0.0, 1.0], [0.0, 7.0]])
    value = supervised_nt_xent(embeddings, torch.tensor([0, 0, 1, 1]), 0.5)
    assert value.item() == pytest.approx(-math.log(math.e**2 / (math.e**2 + 2)), rel=1e-6)


def test_contrast_falls_when_a_positive_comes_nearer() -> None:
    labels = torch.tensor([0, 0, 1])
    near = supervised_nt_xent(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), labels, 0.1)
    far = supervised_nt_xent(torch.tensor([[1.0, 0.0], [0.1, 0.9], [0.0, 1.0]]), labels, 0.1)
    assert near < far


@pytest.mark.parametrize("labels", [[0], [0, 1], [3, 1, 2, 0]], ids=["one image", "two classes", "all different"])
def test_contrast_without_a_positive_pair_is_zero_with_zero_gradients(labels: list[int]) -> None:
    value, gradient = both(supervised_nt_xent, torch.randn(len(labels), 4), torch.tensor(labels), 0.1)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_images_without_a_positive_are_no_anchors_but_are_negatives() -> None:
    embeddings = torch.randn(3, 4, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    _, gradient = both(supervised_nt_xent, embeddings, labels, 0.1)
    assert gradient[2].abs().max() > 0
    pair = supervised_nt_xent(embeddings[:2], labels[:2], 0.1)
    assert pair.abs() < 1e-12
    assert supervised_nt_xent(embeddings, labels, 0.1) > pair


def test_contrast_stays_finite_at_extremes() -> None:
    embeddings = torch.randn(6, 4) * 1e6
    embeddings[1] = embeddings[0]
    embeddings[2] = -embeddings[0]
    value, gradient = both(supervised_nt_xent, embeddings, torch.tensor([0, 0, 0, 1, 1, 2]), 1e-3)
    assert value.isfinite()
    assert gradient.isfinite().all()


def reference(name: str, x: Tensor, t: Tensor) -> Tensor:
    if name == "bce":
        p = 1 / (1 + (-x).exp())
        return -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    if name == "mse":
        return ((x - t) ** 2).mean()
    if name == "smooth_l1":
        d = (x - t).abs()
        return torch.where(d < 1, d**2 / 2, d - 0.5).mean()
    cosines = (x * t).sum(1) / ((x * x).sum(1).sqrt() * (t * t).sum(1).sqrt())
    return (1 - cosines).mean()


@pytest.mark.parametrize("name", RECONSTRUCTION_LOSSES)
def test_reconstruction_losses_are_their_formulas(name: str) -> None:
    prediction = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 2
    target = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    expected = both(lambda x: reference(name, x, target), prediction)
    actual = both(RECONSTRUCTION_LOSSES[name], prediction, target)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", RECONSTRUCTION_LOSSES)
def test_reconstruction_losses_stay_finite_for_large_logits(name: str) -> None:
    prediction = torch.tensor([1e4, -1e4]).view(1, 2, 1, 1)
    value, gradient = both(RECONSTRUCTION_LOSSES[name], prediction, torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))
    assert value.isfinite()
    assert gradient.isfinite().all()
    if name == "bce":
        assert value == 1e4


@pytest.mark.parametrize("name", ["mse", "smooth_l1", "cosine"])
def test_losses_vanish_at_the_target(name: str) -> None:
    target = torch.randn(2, 3, 4, 4)
    assert RECONSTRUCTION_LOSSES[name](target, target) == pytest.approx(0, abs=1e-6)


def test_bce_is_least_where_the_prediction_meets_the_target() -> None:
    target = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 0.8 + 0.1
    _, gradient = both(RECONSTRUCTION_LOSSES["bce"], target.logit(), target)
    assert gradient.abs().max() < 1e-15

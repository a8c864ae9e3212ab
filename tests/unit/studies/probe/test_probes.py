"""Linear probes and neighbours against other ways to the same figures, and against chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from localfeat.studies.probe import probes
from localfeat.studies.probe.probes import linear_probe, neighbour_accuracy, standardised
from tests.helpers import reference

Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def clusters(seed: int, count: int = 60, classes: int = 4, channels: int = 24, apart: float = 0.5) -> Data:
    """Features of overlapping classes, so that the strength of the ridge matters; half of them held out."""
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=2 * count)
    centres = random.normal(size=(classes, channels))
    features = apart * centres[labels] + random.normal(size=(2 * count, channels))
    return features[:count], labels[:count], features[count:], labels[count:]


@pytest.mark.parametrize("seed", range(4))
def test_linear_probe_is_the_ridge_that_predicts_left_out_images_best(seed: int) -> None:
    train, labels, held_out, truth = clusters(seed)
    expected = reference.probe_accuracy(train, labels, held_out, truth, 4)
    assert linear_probe(train, labels, held_out, truth, 4) == pytest.approx(expected)
    targets = np.eye(4)[labels]
    others = {
        (reference.ridge_scores(train, targets, held_out, ridge).argmax(1) == truth).mean() for ridge in probes.RIDGES
    }
    assert len(others) > 3, "or any ridge would do"


def test_linear_probe_of_two_classes_and_of_a_class_without_training_images() -> None:
    train, labels, held_out, truth = clusters(0, classes=2, apart=3.0)
    assert linear_probe(train, labels, held_out, truth, 2) == 1.0
    assert linear_probe(train, 2 * labels, held_out, 2 * truth, 4) == 1.0


@pytest.mark.parametrize("neighbours", [1, 5, 20, 1000])
def test_neighbours_are_those_of_brute_force(neighbours: int) -> None:
    train, labels, held_out, truth = clusters(5)
    train, held_out = train + 0.7, held_out + 0.7  # cosine, not the distance: lengths differ
    expected = reference.knn_accuracy(train, labels, held_out, truth, neighbours)
    assert neighbour_accuracy(train, labels, held_out, truth, neighbours) == pytest.approx(expected)


def test_nothing_is_read_off_features_that_know_nothing() -> None:
    random = np.random.default_rng(0)
    train, held_out = random.normal(size=(1500, 32)), random.normal(size=(1500, 32))
    labels, truth = random.integers(10, size=1500), random.integers(10, size=1500)
    assert linear_probe(train, labels, held_out, truth, 10) == pytest.approx(0.1, abs=0.03)
    assert neighbour_accuracy(train, labels, held_out, truth) == pytest.approx(0.1, abs=0.03)


def test_standardised_on_the_training_features_alone() -> None:
    train, held_out = torch.randn(50, 6) * 3 + 5, torch.randn(20, 6) * 9
    found, other = standardised(train, held_out)
    expected, expected_other = reference.standardised(train.double().numpy(), held_out.double().numpy())
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(other, expected_other, atol=1e-12)
    assert not standardised(torch.ones(9, 2), torch.ones(4, 2))[0].any(), "a dead channel is 0, not NaN"

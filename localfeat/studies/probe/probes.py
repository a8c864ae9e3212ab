"""Probe features: a linear probe in closed form, and nearest neighbours."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

NEIGHBOURS = 20
RIDGES = np.logspace(-3, 5, 9)
"""Ridge strengths to choose from: factors of the squared weights, added to the sum of squared errors over images."""


def standardised(train: Tensor, held_out: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return features (N, C) and (M, C) with mean 0 and standard deviation 1 over ``train``, as float64.

    Constant channels become 0.
    """
    scaler = StandardScaler().fit(train.double().numpy())
    return scaler.transform(train.double().numpy()), scaler.transform(held_out.double().numpy())


def linear_probe(
    train: np.ndarray, train_labels: np.ndarray, held_out: np.ndarray, labels: np.ndarray, num_classes: int
) -> float:
    """Return the accuracy (0 to 1) on ``held_out`` (M, C) of ridge regression to one-hot labels of ``train`` (N, C).

    The strength is the one with the least leave-one-out squared error on ``train`` (in closed form), so the held-out
    images choose nothing.
    """
    probe = RidgeCV(alphas=RIDGES).fit(train, np.eye(num_classes)[train_labels])
    return float((probe.predict(held_out).argmax(1) == labels).mean())


def neighbour_accuracy(
    train: np.ndarray, train_labels: np.ndarray, held_out: np.ndarray, labels: np.ndarray, neighbours: int = NEIGHBOURS
) -> float:
    """Return the accuracy (0 to 1) on ``held_out`` (M, C) of a vote of the nearest images of ``train`` (N, C).

    Distance is by cosine; every neighbour has one vote, and the first of tied classes wins. All of ``train`` votes if
    it has no more than ``neighbours`` images.
    """
    voters = KNeighborsClassifier(min(neighbours, len(train)), metric="cosine", algorithm="brute")
    return float((voters.fit(train, train_labels).predict(held_out) == labels).mean())

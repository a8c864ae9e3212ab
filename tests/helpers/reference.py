"""Compute the probe's figures independently: explicit refits, sorted distances, Gram matrices, hooks on timm models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from localfeat.studies.probe.probes import RIDGES


def standardised(train: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, std = train.mean(0), train.std(0)
    return (train - mean) / std, (held_out - mean) / std


def ridge_scores(train: np.ndarray, targets: np.ndarray, x: np.ndarray, ridge: float) -> np.ndarray:
    """Return predictions at ``x`` by the normal equations, with an unpenalised intercept."""
    centred = train - train.mean(0)
    inverse = np.linalg.inv(centred.T @ centred + ridge * np.eye(train.shape[1]))
    weights = inverse @ centred.T @ (targets - targets.mean(0))
    return (x - train.mean(0)) @ weights + targets.mean(0)


def left_out_error(train: np.ndarray, targets: np.ndarray, ridge: float) -> float:
    """Return the mean leave-one-out squared error, with one refit per row."""
    rows = np.arange(len(train))
    found = [ridge_scores(train[rows != i], targets[rows != i], train[[i]], ridge)[0] for i in rows]
    return float(((np.array(found) - targets) ** 2).mean())


def left_out_error_by_hat(train: np.ndarray, targets: np.ndarray, ridge: float) -> float:
    """Return the same from the hat matrix's diagonal."""
    centred = train - train.mean(0)
    hat = centred @ np.linalg.inv(centred.T @ centred + ridge * np.eye(train.shape[1])) @ centred.T + 1 / len(train)
    residuals = targets - hat @ targets
    return float(((residuals / (1 - np.diag(hat))[:, None]) ** 2).mean())


def probe_accuracy(
    train: np.ndarray, labels: np.ndarray, x: np.ndarray, truth: np.ndarray, classes: int, error: Any = left_out_error
) -> float:
    targets = np.eye(classes)[labels]
    best = min(RIDGES, key=lambda ridge: error(train, targets, ridge))
    return float((ridge_scores(train, targets, x, best).argmax(1) == truth).mean())


def knn_accuracy(train: np.ndarray, labels: np.ndarray, x: np.ndarray, truth: np.ndarray, neighbours: int) -> float:
    """Return the accuracy of a kNN vote, one image at a time; the first of tied classes wins."""
    right = 0
    for row, label in zip(x, truth, strict=True):
        cosines = train @ row / np.linalg.norm(train, axis=1) / np.linalg.norm(row)
        votes = np.bincount(labels[np.argsort(-cosines)[:neighbours]])
        right += int(votes.argmax() == label)
    return right / len(truth)


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Return the normalised Hilbert-Schmidt independence criterion of centred Gram matrices."""
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n
    k, m = h @ (x @ x.T) @ h, h @ (y @ y.T) @ h
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


# The blocks of timm's families, and the spatial axes of their outputs.
SPACE = {"swin": (1, 2), "swinv2": (1, 2), "vit": (1,), "vit_registers": (1,), "convnext": (2, 3), "resnet": (2, 3)}


def timm_blocks(family: str, model: Any) -> Iterator[nn.Module]:
    if family.startswith("vit"):
        yield from model.blocks
    elif family == "resnet":
        yield from (block for i in range(1, 5) for block in getattr(model, f"layer{i}"))
    else:
        stages = model.stages if family == "convnext" else model.layers
        yield from (block for stage in stages for block in stage.blocks)


def hooked_means(family: str, model: nn.Module, images: Tensor) -> tuple[list[np.ndarray], np.ndarray]:
    """Return spatial means after each of timm's own blocks (without class and register tokens), and predictions."""
    found: list[np.ndarray] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        patches = output[:, model.num_prefix_tokens :] if family.startswith("vit") else output  # type: ignore
        found.append(patches.mean(SPACE[family]).double().numpy())

    handles = [block.register_forward_hook(keep) for block in timm_blocks(family, model)]
    with torch.no_grad():
        predictions = model.eval()(images).argmax(1).numpy()
    for handle in handles:
        handle.remove()
    return found, predictions

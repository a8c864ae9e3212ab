"""Losses as pure functions. Each returns a scalar mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def supervised_nt_xent(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """NT-Xent with class labels: images of one class in the batch attract, one view per image.

    For every image i with at least one other image of its class, minus the mean over those positives p of
    ``log softmax(z_i · z_a / T over all a ≠ i)[p]``, z being the embeddings scaled to length 1; then the mean
    over such images. A batch without any positive pair has loss zero (and zero gradients).

    Args:
        embeddings: (B, D), any length.
        labels: (B,) class indices.
        temperature: T > 0.

    Source: Khosla et al., *Supervised Contrastive Learning*, 2020, eq. 2 (``L_out``), with the single view
    per image of InfoPro (Wang et al., 2021).
    """
    z = F.normalize(embeddings, dim=1)
    similarity = z @ z.T / temperature  # (B, B)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_probability = similarity.masked_fill(itself, float("-inf")).log_softmax(dim=1)
    positive = (labels[:, None] == labels[None, :]) & ~itself
    per_image = log_probability.masked_fill(~positive, 0.0).sum(1) / positive.sum(1).clamp(min=1)
    anchors = positive.any(1).sum().clamp(min=1)
    return -per_image.sum() / anchors


def bce(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the binary cross entropy of logits against a target in [0, 1]."""
    if prediction.dim() == 4 and prediction.is_contiguous(memory_format=torch.channels_last):
        # The same numbers in the order in which they lie in memory: torch would copy them, at twice the time.
        prediction, target = prediction.permute(0, 2, 3, 1), target.permute(0, 2, 3, 1)
    return F.binary_cross_entropy_with_logits(prediction, target)


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error."""
    return _compact(F.mse_loss(prediction, target))


def smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean of squared errors up to 1, absolute errors beyond."""
    return _compact(F.smooth_l1_loss(prediction, target))


def _compact(loss: Tensor) -> Tensor:
    """Return the same scalar in memory of its own: torch's shares the memory of all the errors that it averages."""
    return loss.clone()


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Return one minus the mean cosine of prediction and target over the channels, (B, C, H, W) each."""
    return 1 - F.cosine_similarity(prediction, target, dim=1).mean()


RECONSTRUCTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": bce,
    "mse": mse,
    "smooth_l1": smooth_l1,
    "cosine": cosine,
}

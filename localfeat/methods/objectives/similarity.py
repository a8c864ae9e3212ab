"""Similarity matching: the cosines between the images of a batch, in features and in labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from localfeat.backbones.layout import FeatureShape
from localfeat.efficiency.autocast import without_autocast
from localfeat.methods.objective import Objective, Terms, cross_entropy
from localfeat.methods.parts.losses import mse

EPS = 1e-8


def similarity(x: Tensor) -> Tensor:
    """Return the cosines (B, B) between images, of vectors (B, C) or of maps (B, C, H, W).

    Maps are described by their standard deviations over space (unbiased), those of one pixel and vectors by
    themselves; all are centred over the channels of their image.
    """
    if x.dim() == 4:
        one = x.shape[2] == x.shape[3] == 1
        x = x[..., 0, 0] if one else (x.var((2, 3)) + EPS).sqrt()  # whose gradient at 0 would be infinite
    x = x - x.mean(1, keepdim=True)
    x = x / (x.norm(dim=1, keepdim=True) + EPS)
    return x @ x.T


def similarity_loss(maps: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the mean squared difference of the similarities of maps (B, C, H, W) and of labels.

    Args:
        labels: (B,) class indices, or (B, classes) probabilities.
    """
    wanted = labels if labels.is_floating_point() else F.one_hot(labels, classes)
    return mse(similarity(maps), similarity(wanted.to(maps.dtype)))


class SimilarityObjective(Objective):
    """Cross entropy of a linear classifier on mean features, and :func:`similarity_loss` after a 3 x 3 convolution."""

    def __init__(self, shape: FeatureShape, classes: int, weights: dict[str, float], label_smoothing: float) -> None:
        super().__init__()
        self.shape, self.classes, self.label_smoothing, self.weights = shape, classes, label_smoothing, weights
        self.conv = nn.Conv2d(shape.channels, shape.channels, kernel_size=3, padding=1, bias=False)
        self.fc = nn.Linear(shape.channels, classes)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(
        self, inputs: Tensor, outputs: Tensor, images: Tensor | None, labels: Tensor
    ) -> tuple[Terms, Tensor | None]:
        maps = self.shape.to_nchw(outputs)
        logits, compared = self.fc(maps.mean((2, 3))), self.conv(maps)
        with without_autocast(maps.device):
            similar = similarity_loss(compared.float(), labels, self.classes)
        return {"cross_entropy": cross_entropy(logits, labels, self.label_smoothing), "similarity": similar}, None

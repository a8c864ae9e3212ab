"""The auxiliary block of a local module and the head that reads it."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from localfeat.backbones.layout import FeatureShape


class AuxiliaryBlock(nn.Module):
    """LayerNorm, then a 3 x 3 convolution to ``width`` channels and GELU (SPEC: F_i).

    Args:
        shape: the features that the block reads.
        width: channels of its output; not given in the paper (128 here).
    """

    def __init__(self, shape: FeatureShape, width: int) -> None:
        super().__init__()
        self.shape = shape
        self.norm = nn.LayerNorm(shape.channels)
        self.conv = nn.Conv2d(shape.channels, width, kernel_size=3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Features in the backbone's layout -> (B, width, H, W)."""
        return F.gelu(self.convolve(features))

    def convolve(self, features: Tensor) -> Tensor:
        """Return the input of GELU in :meth:`forward`."""
        maps = self.norm(self.shape.to_nhwc(features))
        return cast(Tensor, self.conv(maps.permute(0, 3, 1, 2)))


class NormMeanLinear(nn.Module):
    """LayerNorm, mean over space, linear: a Swin's own classifier, for any features.

    Args:
        shape: the features that it reads; prefix tokens are left out.
        classes: outputs.
    """

    def __init__(self, shape: FeatureShape, classes: int) -> None:
        super().__init__()
        self.shape = shape
        self.norm = nn.LayerNorm(shape.channels)
        self.fc = nn.Linear(shape.channels, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Features in the backbone's layout -> (B, classes)."""
        return cast(Tensor, self.fc(self.norm(self.shape.to_nhwc(features)).mean((1, 2))))


class PooledHead(nn.Sequential):
    """Mean over space, linear, GELU, linear: the projection head, or with one output per class a classifier."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out_features))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, out_features)."""
        return self.project(maps.mean((2, 3)))

    def project(self, pooled: Tensor) -> Tensor:
        """Maps averaged over space already (B, width) -> (B, out_features)."""
        return cast(Tensor, super().forward(pooled))

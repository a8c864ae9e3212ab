"""The auxiliary block of a local module and the head that reads it."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from localfeat.backbones.layout import FeatureShape
from localfeat.utils.errors import UserError


class AuxiliaryBlock(nn.Module):
    """LayerNorm, then a convolution to ``width`` channels and GELU (SPEC: F_i).

    Args:
        shape: the features that the block reads.
        width: channels of its output; not given in the paper (128 here).
        kernel: side of the convolution, odd; not given in the paper (3 here).
    """

    def __init__(self, shape: FeatureShape, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.shape = shape
        self.norm = nn.LayerNorm(shape.channels)
        self.conv = nn.Conv2d(shape.channels, width, kernel, padding=kernel // 2)

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


class PooledMlp(nn.Sequential):
    """DGL's head: maps pooled to a quarter of their sides, 1 x 1 convolutions, 2 x 2 means, a deep MLP; BatchNorm.

    Args:
        shape: the features that it reads.
        classes: outputs.
    """

    def __init__(self, shape: FeatureShape, classes: int) -> None:
        channels, flat = shape.channels, 4 * shape.channels
        layers: list[nn.Module] = [nn.AdaptiveAvgPool2d((-(-shape.height // 4), -(-shape.width // 4)))]
        for _ in range(3):
            layers += [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        for _ in range(3):
            layers += [nn.Linear(flat, flat), nn.BatchNorm1d(flat), nn.ReLU()]
        super().__init__(*layers, nn.Linear(flat, classes))
        self.shape = shape

    def forward(self, features: Tensor) -> Tensor:
        """Features in the backbone's layout -> (B, classes); in training of two images or more."""
        if self.training and len(features) < 2:
            raise UserError("a batch of 1: this head's BatchNorm needs two images; drop_last=True leaves a rest out")
        return cast(Tensor, super().forward(self.shape.to_nchw(features)))

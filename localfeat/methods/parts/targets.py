"""The targets of decoders, in the range that the loss needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localfeat.backbones.layout import FeatureShape


class FeatureTarget(nn.Module):
    """The module's input features, normalised over their channels (LayerNorm without parameters).

    ``bounded`` targets (for binary cross entropy) pass a sigmoid, which brings them into (0, 1).
    """

    kind = "features"

    def __init__(self, shape: FeatureShape, bounded: bool) -> None:
        super().__init__()
        self.shape = shape
        self.bounded = bounded

    @torch.no_grad()
    def forward(self, features: Tensor, images: Tensor | None) -> Tensor:
        """Return (B, C, H, W) from the module's input in the backbone's layout; the images are not used."""
        maps = self.shape.to_nhwc(features).float()
        target = F.layer_norm(maps, maps.shape[-1:]).permute(0, 3, 1, 2)
        return target.sigmoid() if self.bounded else target

    def activate(self, prediction: Tensor) -> Tensor:
        """Return the decoder's output in the target's range."""
        return prediction.sigmoid() if self.bounded else prediction


class ImageTarget(nn.Module):
    """The image that entered the network, as it came out of augmentation.

    ``bounded`` targets (for binary cross entropy) are pixels in [0, 1], clamped: interpolation and random
    erasing leave that range. Otherwise the normalised image itself.
    """

    kind = "image"

    def __init__(self, bounded: bool, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.bounded = bounded
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, features: Tensor, images: Tensor | None) -> Tensor:
        """Return (B, C, H, W) from the normalised images; the features are not used."""
        assert images is not None
        return self._pixels(images).clamp(0, 1) if self.bounded else images.float()

    def activate(self, prediction: Tensor) -> Tensor:
        """Return the decoder's output in the target's range."""
        return prediction.sigmoid() if self.bounded else prediction

    def as_pixels(self, images: Tensor) -> Tensor:
        """Return a target or an activated prediction as pixels in [0, 1], for display."""
        return images if self.bounded else self._pixels(images).clamp(0, 1)

    def _pixels(self, normalised: Tensor) -> Tensor:
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return torch.addcmul(mean, normalised.float(), std)

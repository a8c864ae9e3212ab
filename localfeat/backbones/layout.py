"""The layout of feature maps between blocks, and how to read them as channel-first or channel-last images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Layout = Literal["NHWC", "NLC", "NCHW"]


@dataclass(frozen=True)
class FeatureShape:
    """Shape of one feature map without its batch axis.

    ``NHWC`` is Swin's layout, ``NLC`` a ViT's (``prefix_tokens`` class and register tokens before the
    ``height * width`` patch tokens), ``NCHW`` a convolutional network's.
    """

    layout: Layout
    channels: int
    height: int
    width: int
    prefix_tokens: int = 0

    def to_nchw(self, features: Tensor) -> Tensor:
        """Return the patch features as (B, C, H, W) without prefix tokens, as a view where the layout allows it."""
        if self.layout == "NCHW":
            return features
        return self.to_nhwc(features).permute(0, 3, 1, 2)

    def to_nhwc(self, features: Tensor) -> Tensor:
        """Return the patch features as (B, H, W, C) without prefix tokens."""
        if self.layout == "NHWC":
            return features
        if self.layout == "NCHW":
            return features.permute(0, 2, 3, 1)
        patches = features[:, self.prefix_tokens :]  # (B, L, C)
        return patches.unflatten(1, (self.height, self.width))

    @classmethod
    def of(
        cls, features: Tensor, layout: Layout, *, prefix_tokens: int = 0, grid: tuple[int, int] | None = None
    ) -> FeatureShape:
        """Return the shape of a batch of features; only ``NLC`` needs ``grid`` (patch rows, columns)."""
        if layout == "NHWC":
            _, height, width, channels = features.shape
        elif layout == "NCHW":
            _, channels, height, width = features.shape
        else:
            if grid is None:
                raise ValueError("the layout NLC needs the grid of patches")
            (height, width), channels = grid, features.shape[-1]
        return cls(layout, channels, height, width, prefix_tokens)

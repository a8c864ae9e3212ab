"""The layout of feature maps between blocks, and how to read them as channel-first or channel-last images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

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


class ShapeReader:
    """Read a tensor's shape as that of a feature map.

    Args:
        earlier: the feature map of the cut before; maps do not grow.
    """

    def __init__(self, model: nn.Module, image: tuple[int, int, int], earlier: FeatureShape | None) -> None:
        _, self.height, self.width = image
        self.earlier = earlier
        self.format = str(getattr(model, "output_fmt", "")) if earlier is None else earlier.layout
        self.prefix = getattr(model, "num_prefix_tokens", 0)
        self.grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)

    def read(self, shapes: tuple[tuple[int, ...], ...]) -> FeatureShape | None:
        """Return the feature map of a step with these shapes for batches of two and of three images, if it is one."""
        if len(shapes) != 2 or shapes[0][1:] != shapes[1][1:] or (shapes[0][0], shapes[1][0]) != (2, 3):
            return None
        size = shapes[0][1:]
        if len(size) == 3:
            first, second, third = size
            found = [FeatureShape("NCHW", first, second, third)] if self._fits(second, third) else []
            found += [FeatureShape("NHWC", third, first, second)] if self._fits(first, second) else []
            return min(found, key=lambda shape: shape.layout != self.format, default=None)
        return self._tokens(*size) if len(size) == 2 else None

    def _fits(self, height: int, width: int) -> bool:
        if not (1 <= height <= self.height and 1 <= width <= self.width):
            return False
        if height * width == 1 and self.earlier is not None and self.earlier.height > 2:
            return False  # pooled
        return abs(height * self.width - width * self.height) < max(self.height, self.width)

    def _tokens(self, tokens: int, channels: int) -> FeatureShape | None:
        known = self.prefix if isinstance(self.prefix, int) else 0
        prefixes = dict.fromkeys([known, *range(9)])
        for prefix in prefixes:
            if self.grid is not None and math.prod(self.grid) == tokens - prefix:
                rows, columns = self.grid
                return FeatureShape("NLC", channels, rows, columns, prefix)
        for prefix in prefixes:
            for height in range(self._tallest(tokens), 0, -1):
                width, rest = divmod(tokens - prefix, height)
                if not rest and self._fits(height, width):
                    return FeatureShape("NLC", channels, height, width, prefix)
        return None

    def _tallest(self, tokens: int) -> int:
        tallest = int(math.sqrt(tokens * self.height / self.width)) + 1
        return tallest if self.earlier is None else min(tallest, self.earlier.height)

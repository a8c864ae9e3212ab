"""Three decoders: auxiliary features (B, C_in, h, w) -> the target's shape (B, C_out, H, W).

The output is linear (logits for binary cross entropy). ``upscale`` is H / h, rounded up: 1 or 2 per stage crossed for
feature targets, up to 32 for images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from localfeat.utils.errors import UserError

DecoderFactory = Callable[[int, int, int], nn.Module]


class InterpDecoder(nn.Sequential):
    """A staircase of bilinear interpolation and 3 x 3 convolutions with GELU between, as InfoPro's for 224 px.

    A 1 x 1 convolution to 128 channels comes first, then at most three steps, to 32, to 12 and to the target's
    channels. Each step doubles the size, the first also does the rest: 16 is 4 x 2 x 2. Targets of more than a few
    channels get wider steps: four times as wide as the target, up to the first width.

    Args:
        widths: channels after the 1 x 1 convolution and after every step but the last.
    """

    def __init__(
        self, in_channels: int, out_channels: int, upscale: int, widths: Sequence[int] = (128, 32, 12)
    ) -> None:
        if not widths or any(type(width) is not int or width < 1 for width in widths):
            raise UserError(f"decoder.widths={list(widths)}: it must be one integer or more, each at least 1")
        wide = [min(widths[0], max(width, 4 * out_channels)) for width in widths]
        factors = _doublings(upscale, len(widths))
        channels = [*wide[: len(factors)], out_channels]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, wide[0], kernel_size=1)]
        for factor, (before, after) in zip(factors, pairwise(channels), strict=True):
            layers.append(nn.GELU())
            if factor > 1:
                layers.append(nn.Upsample(scale_factor=factor, mode="bilinear"))
            layers.append(nn.Conv2d(before, after, kernel_size=3, padding=1))
        super().__init__(*layers)


class OneLayerDecoder(nn.Sequential):
    """One 1 x 1 convolution to ``out_channels * upscale²`` channels and pixel shuffle, as SimMIM's prediction head."""

    def __init__(self, in_channels: int, out_channels: int, upscale: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels * upscale**2, kernel_size=1),
            nn.PixelShuffle(upscale) if upscale > 1 else nn.Identity(),
        )


class DeconvDecoder(nn.Sequential):
    """Transposed convolutions with factors 4 and 2 (kernel = stride) with GELU between; channels halve on the way.

    With ``upscale`` 1 a single 3 x 3 transposed convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, upscale: int) -> None:
        if upscale == 1:
            super().__init__(nn.ConvTranspose2d(in_channels, out_channels, kernel_size=3, padding=1))
            return
        layers: list[nn.Module] = []
        channels = in_channels
        factors = _factors(upscale)
        for i, factor in enumerate(factors):
            last = i == len(factors) - 1
            following = out_channels if last else max(channels // 2, 16)
            layers.append(nn.ConvTranspose2d(channels, following, kernel_size=factor, stride=factor))
            if not last:
                layers.append(nn.GELU())
            channels = following
        super().__init__(*layers)


DECODERS: dict[str, DecoderFactory] = {"interp": InterpDecoder, "one_layer": OneLayerDecoder, "deconv": DeconvDecoder}


def as_decoder(decoder: str | DecoderFactory) -> DecoderFactory:
    """Return a decoder's factory by name; return a callable as it is."""
    if callable(decoder):
        return decoder
    if not isinstance(decoder, str) or decoder not in DECODERS:
        raise UserError(f"decoder={decoder}: it is one of {', '.join(DECODERS)}")
    return DECODERS[decoder]


class FittedDecoder(nn.Module):
    """A decoder whose output is brought to the target's height and width.

    Where strides have rounded sizes up (7 pixels from 13), the decoder's output is up to a stride too large at the
    right and at the bottom, and is cut there. Any other difference is interpolated bilinearly.

    Args:
        decoder: enlarges by ``upscale``.
        target: height and width.
    """

    def __init__(self, decoder: nn.Module, upscale: int, target: tuple[int, int]) -> None:
        super().__init__()
        self.decoder, self.upscale, self.target = decoder, upscale, target

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, *target)."""
        decoded: Tensor = self.decoder(features)
        height, width = self.target
        if 0 <= max(decoded.shape[2] - height, decoded.shape[3] - width) < self.upscale:
            return decoded[:, :, :height, :width]
        return F.interpolate(decoded, self.target, mode="bilinear", align_corners=False)


def build_decoder(
    factory: DecoderFactory, in_channels: int, out_channels: int, source: tuple[int, int], target: tuple[int, int]
) -> nn.Module:
    """Return a decoder from feature maps (h, w) to a target (H, W), at least as large.

    Raises:
        UserError: the target is smaller than the feature maps.
    """
    if target[0] < source[0] or target[1] < source[1]:
        raise UserError(f"a decoder enlarges: {source} features cannot become a {target} target")
    upscale = max(-(-target[0] // source[0]), -(-target[1] // source[1]))
    decoder = factory(in_channels, out_channels, upscale)
    exact = (source[0] * upscale, source[1] * upscale) == target
    return decoder if exact else FittedDecoder(decoder, upscale, target)


def _factors(upscale: int) -> list[int]:
    """Factor ``upscale`` into 4s, at most one 2, and the rest (7 for patches of 14 pixels)."""
    factors = []
    for factor in (4, 4, 4, 2):
        if upscale % factor == 0:
            factors.append(factor)
            upscale //= factor
    return [*factors, upscale] if upscale > 1 else factors


def _doublings(upscale: int, most: int) -> list[int]:
    """Factor ``upscale`` into at most ``most`` factors: 2s at the end, the rest in front."""
    factors: list[int] = []
    while len(factors) < most - 1 and upscale % 2 == 0 and upscale > 2:
        factors.append(2)
        upscale //= 2
    return [upscale, *factors]

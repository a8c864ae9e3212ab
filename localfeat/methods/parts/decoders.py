"""Three decoders: auxiliary features (B, C_in, h, w) -> the target's shape (B, C_out, H, W).

The output is linear (logits for binary cross entropy). ``upscale`` is H / h: 1 or 2 per stage crossed for
feature targets, up to 32 for images.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from localfeat.utils.errors import UserError

DecoderFactory = Callable[[int, int, int], nn.Module]


class InterpDecoder(nn.Sequential):
    """Bilinear interpolation to the target's size, then two 3 x 3 convolutions with GELU between, as InfoPro.

    The convolutions run at full size, which is what makes this decoder heavy for images.

    Args:
        hidden_channels: between the convolutions; ``None`` takes the smaller of ``in_channels`` and four times
            ``out_channels`` (for images InfoPro's 12).
    """

    def __init__(self, in_channels: int, out_channels: int, upscale: int, hidden_channels: int | None = None) -> None:
        if hidden_channels is not None and hidden_channels < 1:
            raise UserError(f"decoder.hidden_channels={hidden_channels}: it must be at least 1, or null")
        hidden = hidden_channels or min(in_channels, 4 * out_channels)
        resize = nn.Upsample(scale_factor=upscale, mode="bilinear") if upscale > 1 else nn.Identity()
        super().__init__(
            resize,
            nn.Conv2d(in_channels, hidden, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv2d(hidden, out_channels, kernel_size=3, padding=1),
        )


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


def upscale_factor(source: tuple[int, int], target: tuple[int, int]) -> int:
    """Return H / h for feature maps (h, w) and a target (H, W): a whole number, equal to W / w."""
    factor = max(target[0] // source[0], 1)
    if (source[0] * factor, source[1] * factor) != target:
        raise UserError(f"a decoder enlarges by a whole number: {source} features cannot become a {target} target")
    return factor


def _factors(upscale: int) -> list[int]:
    """Factor ``upscale`` into 4s, at most one 2, and the rest (7 for patches of 14 pixels)."""
    factors = []
    for factor in (4, 4, 4, 2):
        if upscale % factor == 0:
            factors.append(factor)
            upscale //= factor
    return [*factors, upscale] if upscale > 1 else factors

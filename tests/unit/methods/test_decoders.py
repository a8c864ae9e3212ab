"""Every decoder against index arithmetic in float64: forward, and the gradients of input and weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localfeat.methods.parts.decoders import (
    DECODERS,
    DeconvDecoder,
    FittedDecoder,
    InterpDecoder,
    OneLayerDecoder,
    as_decoder,
    build_decoder,
)
from localfeat.utils.errors import UserError

UPSCALES = [1, 2, 4, 8, 14, 32]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def conv3(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """3 x 3 convolution with padding 1 as a sum of nine shifted products."""
    height, width = x.shape[2:]
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    out = layer.bias.view(1, -1, 1, 1)
    for i in range(3):
        for j in range(3):
            window = padded[:, :, i : i + height, j : j + width]
            out = out + torch.einsum("bchw,oc->bohw", window, layer.weight[:, :, i, j])
    return out


def bilinear_matrix(size: int, factor: int) -> Tensor:
    """(size * factor, size): row o holds the weights of the inputs; pixel centres at half integers, edges repeat."""
    matrix = torch.zeros(size * factor, size, dtype=torch.float64)
    for o in range(size * factor):
        position = max((o + 0.5) / factor - 0.5, 0.0)
        low = min(int(position), size - 1)
        high = min(low + 1, size - 1)
        matrix[o, low] += 1 - (position - low)
        matrix[o, high] += position - low
    return matrix


STAIRS = {1: [1], 2: [2], 4: [2, 2], 8: [2, 2, 2], 14: [7, 2], 32: [8, 2, 2]}


def interp(x: Tensor, decoder: InterpDecoder, factor: int) -> Tensor:
    first, *steps = (layer for layer in decoder if isinstance(layer, nn.Conv2d))
    x = torch.einsum("bchw,oc->bohw", x, first.weight[:, :, 0, 0]) + first.bias.view(1, -1, 1, 1)
    for stride, layer in zip(STAIRS[factor], steps, strict=True):
        rows, columns = bilinear_matrix(x.shape[2], stride), bilinear_matrix(x.shape[3], stride)
        x = conv3(torch.einsum("ih,bchw,jw->bcij", rows, gelu(x), columns), layer)
    return x


def one_layer(x: Tensor, decoder: OneLayerDecoder, factor: int) -> Tensor:
    """out[b, c, i, j] is channel c * f² + (i mod f) * f + (j mod f) of the convolution at (i // f, j // f)."""
    layer = decoder[0]
    assert isinstance(layer, nn.Conv2d)
    maps = torch.einsum("bchw,oc->bohw", x, layer.weight[:, :, 0, 0]) + layer.bias.view(1, -1, 1, 1)
    channels = torch.arange(len(layer.bias) // factor**2)
    i, j = torch.arange(x.shape[2] * factor), torch.arange(x.shape[3] * factor)
    source = channels[:, None, None] * factor**2 + (i % factor)[None, :, None] * factor + (j % factor)
    return maps[:, source, (i // factor)[None, :, None], (j // factor)[None, None, :]]


def transposed(x: Tensor, layer: nn.ConvTranspose2d) -> Tensor:
    """Kernel = stride: every input pixel becomes its own k x k patch, no overlap."""
    k = layer.stride[0]
    patches = torch.einsum("bchw,coij->bohiwj", x, layer.weight)
    out = patches.reshape(len(x), -1, x.shape[2] * k, x.shape[3] * k)
    return out + layer.bias.view(1, -1, 1, 1)


def deconv(x: Tensor, decoder: DeconvDecoder, factor: int) -> Tensor:
    layers = [layer for layer in decoder if isinstance(layer, nn.ConvTranspose2d)]
    if factor == 1:
        return transposed_same(x, layers[0])
    for number, layer in enumerate(layers):
        x = transposed(gelu(x) if number else x, layer)
    return x


def transposed_same(x: Tensor, layer: nn.ConvTranspose2d) -> Tensor:
    """3 x 3, stride 1, padding 1: pixel (h, w) is spread to (h + i - 1, w + j - 1)."""
    height, width = x.shape[2:]
    pieces = []
    for i in range(3):
        for j in range(3):
            spread = torch.einsum("bchw,co->bohw", x, layer.weight[:, :, i, j])
            pieces.append(nn.functional.pad(spread, (j, 2 - j, i, 2 - i))[:, :, 1 : height + 1, 1 : width + 1])
    return torch.stack(pieces).sum(0) + layer.bias.view(1, -1, 1, 1)


REFERENCES: dict[str, Any] = {"interp": interp, "one_layer": one_layer, "deconv": deconv}


@pytest.mark.parametrize("upscale", UPSCALES)
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_is_its_definition(name: str, upscale: int) -> None:
    decoder = DECODERS[name](6, 3, upscale).double()
    x = torch.randn(2, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    actual = decoder(x)
    expected = REFERENCES[name](x, decoder, upscale)
    assert actual.shape == (2, 3, 2 * upscale, 3 * upscale)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(actual)
    variables = [x, *decoder.parameters()]
    got = torch.autograd.grad(actual, variables, direction)
    torch.testing.assert_close(got, torch.autograd.grad(expected, variables, direction), rtol=1e-9, atol=1e-11)
    assert all(gradient.abs().max() > 0 for gradient in got)


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_output_is_linear_in_its_last_layer(name: str) -> None:
    """Logits: nothing squashes the output, so values of both signs beyond 1 come out."""
    decoder = DECODERS[name](4, 3, 2)
    out = decoder(torch.randn(2, 4, 4, 4) * 100)
    assert out.min() < -1
    assert out.max() > 1


@pytest.mark.parametrize(
    ("upscale", "strides"), [(2, [2]), (4, [4]), (8, [4, 2]), (14, [2, 7]), (16, [4, 4]), (32, [4, 4, 2]), (3, [3])]
)
def test_deconv_is_built_of_factors_4_and_2(upscale: int, strides: list[int]) -> None:
    layers = [layer for layer in DeconvDecoder(64, 3, upscale) if isinstance(layer, nn.ConvTranspose2d)]
    assert [layer.stride[0] for layer in layers] == strides
    assert [layer.in_channels for layer in layers] == [64, 32, 16][: len(layers)]


def test_interp_widths_as_documented() -> None:
    def widths(*given: Any) -> list[int]:
        return [layer.out_channels for layer in InterpDecoder(*given) if isinstance(layer, nn.Conv2d)]

    assert widths(100, 3, 16) == [128, 32, 12, 3]
    assert widths(128, 3, 4) == [128, 32, 3]
    assert widths(128, 96, 2) == [128, 96]
    assert widths(128, 24, 8) == [128, 96, 96, 24]
    assert widths(128, 3, 16, [8, 4]) == [8, 8, 3]


def test_decoders_by_name_and_by_factory() -> None:
    assert as_decoder("deconv") is DeconvDecoder
    assert as_decoder(OneLayerDecoder) is OneLayerDecoder
    with pytest.raises(UserError, match=r"decoder=linear: it is one of interp, one_layer, deconv"):
        as_decoder("linear")


@pytest.mark.parametrize("factory", [InterpDecoder, OneLayerDecoder, DeconvDecoder])
@pytest.mark.parametrize(
    ("source", "target", "upscale"),
    [
        ((7, 7), (224, 224), 32),
        ((4, 8), (8, 16), 2),
        ((8, 8), (8, 8), 1),
        ((4, 6), (7, 12), 2),
        ((27, 27), (224, 224), 9),
    ],
)
def test_any_target_is_reached(factory: Any, source: tuple[int, int], target: tuple[int, int], upscale: int) -> None:
    seen: list[int] = []
    decoder = build_decoder(lambda *given: seen.append(given[2]) or factory(*given), 3, 5, source, target)
    assert decoder(torch.randn(2, 3, *source)).shape == (2, 5, *target)
    assert seen == [upscale]
    assert isinstance(decoder, FittedDecoder) == ((source[0] * upscale, source[1] * upscale) != target)


def test_what_rounding_up_added_is_cut_and_the_rest_interpolated() -> None:
    features = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    repeat = nn.Upsample(scale_factor=2, mode="nearest")
    cut = build_decoder(lambda *_: repeat, 1, 1, (4, 4), (7, 7))(features)
    assert cut[0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3]
    stretched = build_decoder(lambda *_: repeat, 1, 1, (4, 4), (5, 5))(features)
    torch.testing.assert_close(stretched, F.interpolate(repeat(features), (5, 5), mode="bilinear"))


def test_a_target_smaller_than_the_features_is_refused() -> None:
    with pytest.raises(UserError, match=r"^a decoder enlarges: \(8, 8\) features cannot become a \(4, 8\) target$"):
        build_decoder(OneLayerDecoder, 3, 5, (8, 8), (4, 8))

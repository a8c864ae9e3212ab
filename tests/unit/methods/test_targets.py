"""Targets: values against the formula, ranges, layouts, and no gradient."""

from __future__ import annotations

import pytest
import torch

from localfeat.backbones.layout import FeatureShape
from localfeat.methods.parts.targets import FeatureTarget, ImageTarget
from localfeat.methods.site import IMAGENET_MEAN, IMAGENET_STD

CHANNELS, HEIGHT, WIDTH, PREFIX = 6, 2, 3, 5


def features_in(layout: str, maps: torch.Tensor) -> torch.Tensor:
    """The maps (B, C, H, W) written out in a layout, position by position."""
    if layout == "NCHW":
        return maps.clone()
    if layout == "NHWC":
        return torch.stack([torch.stack([maps[:, :, i, j] for j in range(WIDTH)], 1) for i in range(HEIGHT)], 1)
    tokens = [torch.full((len(maps), CHANNELS), 1e3)] * PREFIX
    tokens += [maps[:, :, i, j] for i in range(HEIGHT) for j in range(WIDTH)]
    return torch.stack(tokens, 1)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("layout", ["NHWC", "NLC", "NCHW"])
def test_feature_target_is_the_normalised_input_in_every_layout(layout: str, bounded: bool) -> None:
    maps = torch.randn(2, CHANNELS, HEIGHT, WIDTH) * 4 + 2
    shape = FeatureShape(layout, CHANNELS, HEIGHT, WIDTH, PREFIX if layout == "NLC" else 0)
    expected = (maps - maps.mean(1, keepdim=True)) / (maps.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    if bounded:
        expected = 1 / (1 + (-expected).exp())
    target = FeatureTarget(shape, bounded)(features_in(layout, maps), None)
    torch.testing.assert_close(target, expected)
    assert shape.to_nchw(features_in(layout, maps)).shape == maps.shape


def test_feature_target_has_no_gradient_and_is_float32() -> None:
    features = torch.randn(2, HEIGHT, WIDTH, CHANNELS, requires_grad=True)
    target = FeatureTarget(FeatureShape("NHWC", CHANNELS, HEIGHT, WIDTH), True)
    assert not target(features, None).requires_grad
    assert target(features.bfloat16(), None).dtype == torch.float32
    assert 0 < target(features * 1e4, None).min() < target(features, None).max() < 1


def test_constant_features_are_no_trouble() -> None:
    target = FeatureTarget(FeatureShape("NHWC", CHANNELS, HEIGHT, WIDTH), True)
    assert torch.equal(
        target(torch.ones(1, HEIGHT, WIDTH, CHANNELS), None), torch.full((1, CHANNELS, HEIGHT, WIDTH), 0.5)
    )


def test_image_target_is_the_pixels_in_0_to_1() -> None:
    pixels = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    target = ImageTarget(True, IMAGENET_MEAN, IMAGENET_STD)
    images = ((pixels - mean) / std).requires_grad_()
    torch.testing.assert_close(target(torch.empty(0), images), pixels)
    assert not target(torch.empty(0), images).requires_grad
    beyond = target(torch.empty(0), images * 100)
    assert beyond.min() == 0
    assert beyond.max() == 1


def test_unbounded_image_target_is_the_normalised_image_and_is_shown_as_pixels() -> None:
    pixels = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.1, 0.2, 0.3])
    images = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    target = ImageTarget(False, mean.tolist(), std.tolist())
    assert torch.equal(target(torch.empty(0), images), images)
    torch.testing.assert_close(target.as_pixels(target.activate(images)), pixels)
    assert target.as_pixels(images * 100).max() == 1


def test_activation_brings_logits_into_the_range_of_bounded_targets_only() -> None:
    logits = torch.randn(1, 3, 2, 2) * 5
    for target in (ImageTarget(True, IMAGENET_MEAN, IMAGENET_STD), FeatureTarget(FeatureShape("NCHW", 3, 2, 2), True)):
        torch.testing.assert_close(target.activate(logits), 1 / (1 + (-logits).exp()))
    assert torch.equal(FeatureTarget(FeatureShape("NCHW", 3, 2, 2), False).activate(logits), logits)

"""Every operation compared with torchvision, PIL or timm on single images at the same magnitude."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from timm.data import auto_augment
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from localfeat.data import randaugment
from localfeat.data.randaugment import OPERATIONS, rand_augment

FILL = torch.tensor([124.0, 116.0, 104.0])


def photos(count: int = 12, size: int = 24) -> Tensor:
    """Make smooth coloured images with some noise, each with its own range of values."""
    base = torch.rand(count, 3, 4, 4)
    smooth = reference.resize(base, [size, size], antialias=True) + 0.05 * torch.randn(count, 3, size, size)
    low, span = torch.rand(count, 1, 1, 1) * 60, torch.rand(count, 1, 1, 1) * 120 + 60
    return (low + span * smooth).clamp(0, 255).to(torch.uint8)


def difference(got: Tensor, expected: Tensor) -> int:
    return int((got.int() - expected.int()).abs().max())


def pil(function: object, images: Tensor, *arguments: list) -> Tensor:
    """Apply a PIL function to each image with its own arguments."""
    results = []
    for i, image in enumerate(images):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        changed = function(picture, *(argument[i] for argument in arguments))  # type: ignore[operator]
        results.append(torch.from_numpy(np.array(changed)).permute(2, 0, 1))
    return torch.stack(results)


def test_auto_contrast_equalize_invert() -> None:
    images = photos()
    images[0] = 77  # constant: stays
    images[1, 0] = 200
    none = torch.zeros(len(images))
    assert difference(randaugment.auto_contrast(images, none, FILL), pil(ImageOps.autocontrast, images)) <= 1
    assert difference(randaugment.auto_contrast(images, none, FILL), reference.autocontrast(images)) <= 1
    assert torch.equal(randaugment.equalize(images, none, FILL), pil(ImageOps.equalize, images))
    assert torch.equal(randaugment.equalize(images, none, FILL), reference.equalize(images))
    assert torch.equal(randaugment.invert(images, none, FILL), pil(ImageOps.invert, images))


def test_posterize_solarize() -> None:
    images = photos()
    bits = torch.arange(12) % 8 + 1
    expected = pil(auto_augment.posterize, images, bits.tolist())
    assert torch.equal(randaugment.posterize(images, bits.float(), FILL), expected)
    thresholds = torch.linspace(0, 256, 12).round()
    expected = pil(auto_augment.solarize, images, thresholds.tolist())
    assert torch.equal(randaugment.solarize(images, thresholds, FILL), expected)
    amounts = torch.arange(12) * 10
    expected = pil(auto_augment.solarize_add, images, amounts.tolist())
    assert torch.equal(randaugment.solarize_add(images, amounts.float(), FILL), expected)


@pytest.mark.parametrize(
    ("name", "torchvision_name", "enhancer"),
    [
        ("color", "adjust_saturation", ImageEnhance.Color),
        ("contrast", "adjust_contrast", ImageEnhance.Contrast),
        ("brightness", "adjust_brightness", ImageEnhance.Brightness),
        ("sharpness", "adjust_sharpness", ImageEnhance.Sharpness),
    ],
)
def test_enhancements(name: str, torchvision_name: str, enhancer: type) -> None:
    images, factors = photos(), torch.linspace(0.1, 1.9, 12)
    got = getattr(randaugment, name)(images, factors, FILL)
    expected = [getattr(reference, torchvision_name)(i, f) for i, f in zip(images, factors.tolist(), strict=True)]
    assert difference(got, torch.stack(expected)) <= 1
    by_pil = pil(lambda image, factor: enhancer(image).enhance(factor), images, factors.tolist())
    assert difference(got, by_pil) <= 2


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_geometry(name: str) -> None:
    images = photos()
    magnitudes = torch.linspace(-0.3, 0.3, 12) * (100 if name == "rotate" else 1)
    got = getattr(randaugment, name)(images, magnitudes, FILL)
    # Where image and fill blend, torchvision weights the image twice, so those pixels are left out.
    share = getattr(randaugment, name)(torch.full_like(images, 255), magnitudes, torch.zeros(3))
    clear = (share == 0) | (share == 255)
    assert clear.float().mean() > 0.9
    for image, magnitude, result, compared in zip(images, magnitudes.tolist(), got, clear, strict=True):
        degrees = math.degrees(math.atan(magnitude))
        options = {
            "rotate": {"angle": -magnitude},
            "shear_x": {"shear": [degrees, 0.0], "center": [0.0, 0.0]},
            "shear_y": {"shear": [0.0, degrees], "center": [0.0, 0.0]},
            "translate_x": {"translate": [-magnitude * 24, 0]},
            "translate_y": {"translate": [0, -magnitude * 24]},
        }[name]
        settings = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | options
        expected = reference.affine(
            image.float(), **settings, interpolation=InterpolationMode.BILINEAR, fill=FILL.tolist()
        )
        assert difference(result[compared], expected.round().clamp(0, 255)[compared]) <= 1


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_geometry_has_timms_direction(name: str) -> None:
    images = photos(6, 40)
    magnitudes = torch.tensor([-0.3, -0.1, 0.05, 0.1, 0.2, 0.3]) * (100 if name == "rotate" else 1)
    function = getattr(auto_augment, name + "_rel" if name.startswith("translate") else name)
    options = {"resample": Image.Resampling.BILINEAR, "fillcolor": (124, 116, 104)}
    expected = pil(lambda image, magnitude: function(image, magnitude, **options), images, magnitudes.tolist())
    got = getattr(randaugment, name)(images, magnitudes, FILL)
    assert (got.int() - expected.int()).abs().float().mean() < 1.5  # PIL treats the outermost pixel differently
    assert (got.int() - expected.int()).abs().float().median() <= 1


def test_operations_and_magnitudes_are_timms_increasing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(OPERATIONS) == auto_augment._RAND_INCREASING_TRANSFORMS
    for draw, sign in ((0.9, -1.0), (0.1, 1.0)):
        monkeypatch.setattr(random, "random", lambda draw=draw: draw)
        for name, (_, magnitude) in OPERATIONS.items():
            of_level = auto_augment.LEVEL_TO_ARG[name]
            for level in (0.0, 3.3, 9.0, 9.4, 10.0):
                if of_level is not None and name != "PosterizeIncreasing":
                    expected = of_level(level, {})
                    value = expected[0] if isinstance(expected, tuple) else expected
                    got = magnitude(torch.tensor([level]), torch.tensor([sign]))
                    assert math.isclose(float(got), value, rel_tol=1e-5), name


def test_images_draw_their_own_operations() -> None:
    torch.manual_seed(0)
    image = photos(1)
    augmented = rand_augment(image.expand(256, -1, -1, -1), FILL.tolist())
    unchanged = (augmented == image).flatten(1).all(1).float().mean()
    assert 0.15 < unchanged < 0.4  # two operations, each left out with probability one half
    assert len(augmented.flatten(1).unique(dim=0)) > 100
    always = rand_augment(image.expand(256, -1, -1, -1), FILL.tolist(), num_ops=1, probability=1.0)
    assert len(always.flatten(1).unique(dim=0)) > 100


def test_order_of_the_batch_is_kept() -> None:
    constant = torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1).expand(60, 3, 8, 8)
    assert torch.equal(rand_augment(constant, FILL.tolist(), probability=0.0), constant)
    marked = rand_augment(constant, [0.0, 0.0, 0.0], num_ops=1, probability=0.3)
    same = (marked == constant).flatten(1).all(1)
    assert 30 < same.sum() < 60

"""Batched geometry compared with torchvision on single images, and per-image randomness."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from localfeat.data import batched_transforms as batched
from localfeat.data.mixing import mix
from localfeat.data.preparation import Preparation

BICUBIC = InterpolationMode.BICUBIC


def pictures(count: int, height: int, width: int | None = None) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width or height), dtype=torch.uint8)


def preparation(augmentation: str = "none", size: int | tuple[int, int] = 16, **changes: object) -> Preparation:
    options = {"horizontal_flip": True, "mixup": 0.0, "cutmix": 0.0, "num_classes": 10}
    return Preparation(size, augmentation, **(options | changes), mean=[0.5] * 3, std=[0.25] * 3)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(2, 40), size=st.tuples(st.integers(1, 48), st.integers(2, 48)))
def test_resize_is_antialiased_bicubic(height: int, width: int, size: tuple[int, int]) -> None:
    """Of and to images one pixel wide torch's own resizing is wrong (it reads another layout)."""
    images = pictures(2, height, width).float()
    expected = reference.resize(images, list(size), interpolation=BICUBIC, antialias=True).clamp(0, 255)
    torch.testing.assert_close(batched.resize(images, size), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (16, 20), (33, 16)])
def test_crop_and_resize_of_each_image(size: tuple[int, int]) -> None:
    images = pictures(6, 24, 30).float()
    boxes = batched.draw_crops(6, 24, 30, scale=(0.05, 1.0))
    flips = torch.tensor([True, False] * 3)
    got = batched.crop_and_resize(images, boxes, size, flips)
    assert len({tuple(int(edge[i]) for edge in boxes) for i in range(6)}) == 6
    for i in range(6):
        box = [int(edge[i]) for edge in boxes]
        expected = reference.resized_crop(images[i], *box, size=list(size), interpolation=BICUBIC, antialias=True)
        expected = reference.horizontal_flip(expected) if flips[i] else expected
        torch.testing.assert_close(got[i], expected.clamp(0, 255), atol=2e-3, rtol=0)


def test_crop_boxes_have_the_recipes_distribution() -> None:
    boxes = batched.draw_crops(20_000, 96, 96)
    share = (boxes.height * boxes.width) / 96**2
    aspect = boxes.width / boxes.height
    draws = [RandomResizedCrop.get_params(torch.empty(3, 96, 96), (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(5000)]
    expected = sum(height * width for _, _, height, width in draws) / len(draws) / 96**2
    assert share.min() > 0.07 and share.max() <= 1 and abs(share.mean() - expected) < 0.02
    assert aspect.min() > 0.72 and aspect.max() < 1.39 and abs(aspect.log().mean()) < 0.01
    assert (boxes.top + boxes.height).max() == 96 and boxes.top.min() == 0


def test_padded_crop_shows_a_window_of_the_padded_image() -> None:
    images = pictures(200, 8)
    flips = batched.draw_flips(200)
    got = batched.padded_crop(images, 2, flips)
    padded = torch.nn.functional.pad(images, (2,) * 4)
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)  # (B, 3, 5, 5, 8, 8)
    windows = torch.where(flips.view(-1, 1, 1, 1, 1, 1), windows.flip(-1), windows)
    same = (windows == got[:, :, None, None]).all(-1).all(-1).all(1)  # (B, 5, 5)
    assert same.any(-1).any(-1).all()
    assert same.any(0).all()  # every offset occurs
    assert 60 < flips.sum() < 140


@pytest.mark.parametrize("augmentation", ["light", "swin"])
@pytest.mark.parametrize("side", [16, 48])
def test_parameters_differ_within_a_batch(augmentation: str, side: int) -> None:
    torch.manual_seed(0)
    images = pictures(1, side).expand(64, -1, -1, -1)
    prepared, _ = preparation(augmentation, size=24)(images, torch.zeros(64).long(), training=True)
    assert prepared.shape == (64, 3, 24, 24) and prepared.dtype == torch.float32
    assert len(prepared.flatten(1).unique(dim=0)) > 25


@pytest.mark.parametrize("augmentation", ["none", "light", "swin"])
def test_the_global_seed_decides(augmentation: str) -> None:
    images, labels = pictures(16, 20), torch.arange(16) % 10
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(preparation(augmentation, mixup=0.4)(images, labels, training=True)[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("augmentation", ["none", "light", "swin"])
def test_evaluation_only_resizes_and_normalises(augmentation: str) -> None:
    images, labels = pictures(4, 20, 26), torch.arange(4)
    state = torch.get_rng_state()
    prepare = preparation(augmentation, mixup=0.4, cutmix=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, same_labels = prepare(images, labels, training=False)
    square = images[..., 3:23]
    expected = reference.resize(square.float(), [16, 16], interpolation=BICUBIC, antialias=True).clamp(0, 255)
    torch.testing.assert_close(got, (expected / 255 - 0.5) / 0.25, atol=1e-4, rtol=0)
    assert same_labels is labels and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("height", "width", "part"), [(20, 30, (20, 30)), (20, 40, (20, 30)), (40, 30, (20, 30))])
def test_the_largest_central_part_of_the_network_s_aspect_is_taken(
    height: int, width: int, part: tuple[int, int]
) -> None:
    images = pictures(2, height, width)
    top, left = (height - part[0]) // 2, (width - part[1]) // 2
    central = images[..., top : top + part[0], left : left + part[1]].float()
    expected = reference.resize(central, [16, 24], interpolation=BICUBIC, antialias=True).clamp(0, 255)
    got, _ = preparation(size=(16, 24))(images, torch.arange(2), training=False)
    torch.testing.assert_close(got, (expected / 255 - 0.5) / 0.25, atol=1e-4, rtol=0)


@pytest.mark.parametrize("augmentation", ["light", "swin"])
@pytest.mark.parametrize("source", [(20, 30), (60, 90)])
def test_augmented_rectangles_have_the_network_s_size(augmentation: str, source: tuple[int, int]) -> None:
    images, labels = pictures(8, *source), torch.arange(8)
    got, _ = preparation(augmentation, size=(16, 24), cutmix=1.0)(images, labels, training=True)
    assert got.shape == (8, 3, 16, 24) and got.isfinite().all()


def test_crops_keep_the_image_s_aspect_on_average() -> None:
    boxes = batched.draw_crops(4000, 40, 80)
    assert float((boxes.width / boxes.height).log().mean().exp()) == pytest.approx(2, rel=0.03)


def test_no_flip_when_switched_off() -> None:
    images = torch.zeros(200, 3, 16, 16, dtype=torch.uint8)
    images[..., :6] = 255  # bright on the left; a crop by 2 px cannot bring it to the right
    for flip in (False, True):
        prepared, _ = preparation("light", horizontal_flip=flip)(images, torch.zeros(200).long(), training=True)
        mirrored = prepared[:, :, 4:12, 11:].amax((1, 2, 3)) > 0
        assert bool(mirrored.any()) == flip


def test_grey_images_become_three_channels() -> None:
    grey = pictures(2, 16)[:, :1]
    prepared, _ = preparation()(grey, torch.zeros(2).long(), training=False)
    torch.testing.assert_close(prepared, ((grey / 255 - 0.5) / 0.25).expand(-1, 3, -1, -1))


def test_input_is_never_changed() -> None:
    images = pictures(8, 16)
    before = images.clone()
    for augmentation in ("none", "light", "swin"):
        preparation(augmentation, cutmix=1.0)(images, torch.arange(8), training=True)
    assert torch.equal(images, before)


def test_erasing_areas_and_share() -> None:
    boxes = batched.draw_erasures(20_000, 32, 32)
    area = boxes.height * boxes.width / 32**2
    drawn = area[area > 0]
    assert len(drawn) > 19_900 and drawn.min() > 0.015 and drawn.max() < 0.36
    assert abs(drawn.mean() - (0.02 + 1 / 3) / 2) < 0.01
    aspect = (boxes.height / boxes.width)[area > 0]
    assert aspect.max() < 5 and abs(aspect.log().mean()) < 0.03
    torch.manual_seed(0)
    erased = batched.random_erasing(torch.full((4000, 3, 32, 32), 7.0)) != 7
    touched = erased.flatten(1).any(1)
    assert abs(touched.float().mean() - 0.25) < 0.03
    noise = batched.random_erasing(torch.full((500, 3, 32, 32), 7.0), probability=1.0)
    values = noise[noise != 7]
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02


def test_erased_pixels_form_one_rectangle() -> None:
    erased = batched.random_erasing(torch.full((50, 3, 20, 24), 7.0), probability=1.0) != 7
    for image in erased[:, 0]:
        rows, columns = image.any(1), image.any(0)
        assert torch.equal(image, rows[:, None] & columns[None, :])
        assert rows.any() and (rows.int().diff().abs().sum() <= 2)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_labels_say_what_is_seen(mixup: float, cutmix: float) -> None:
    labels = torch.arange(64) % 4
    images = (labels.float() * 10 + 1).view(-1, 1, 1, 1).expand(64, 3, 12, 12)
    mixed, targets = mix(images, labels, 4, mixup, cutmix)
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    assert targets.min() >= 0 and targets.dtype == torch.float32
    # The mean grey of an image is the label-weighted mean of the class greys, for both methods.
    greys = torch.arange(4) * 10.0 + 1
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ greys, atol=1e-4, rtol=1e-4)
    assert len(targets.amax(1).unique()) > 20  # every image has its own share
    constant = (mixed.amax((1, 2, 3)) - mixed.amin((1, 2, 3))) < 1e-5
    assert bool(constant.all()) == (cutmix == 0)


def test_labels_stay_hard_without_mixing() -> None:
    labels = torch.arange(4)
    for training, mixup in ((True, 0.0), (False, 0.5)):
        _, got = preparation(mixup=mixup)(pictures(4, 16), labels, training=training)
        assert got is labels
    _, soft = preparation(mixup=0.5)(pictures(4, 16), labels, training=True)
    assert soft.shape == (4, 10)


def test_half_of_the_flips() -> None:
    assert math.isclose(batched.draw_flips(10_000).float().mean(), 0.5, abs_tol=0.03)


@pytest.mark.parametrize("augmentation", ["none", "light", "swin"])
@pytest.mark.parametrize("side", [16, 48])
def test_no_operation_mixes_devices(augmentation: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on the meta device, which stands for any device other than the CPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta has no autocast
    images = torch.empty(8, 3, side, side, dtype=torch.uint8, device="meta")
    labels = torch.zeros(8, dtype=torch.int64, device="meta")
    prepared, targets = preparation(augmentation, mixup=0.5, cutmix=0.5)(images, labels, training=True)
    assert prepared.device.type == targets.device.type == "meta" and targets.shape == (8, 10)


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", ["none", "light", "swin"])
def test_same_seed_same_augmentation_on_cuda(augmentation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "random_erasing", lambda images: images)  # its noise is drawn on the device
    images, labels, results = pictures(32, 48), torch.arange(32) % 10, []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        prepare = preparation(augmentation, size=40, mixup=0.5, cutmix=0.5)
        results.append(prepare(images.to(device), labels.to(device), training=True))
    difference = (results[0][0] - results[1][0].cpu()).abs()
    assert difference.mean() < 0.01  # rounding to whole grey values may go either way
    torch.testing.assert_close(results[0][1], results[1][1].cpu())

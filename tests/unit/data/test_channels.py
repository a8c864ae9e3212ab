"""Images of other than three channels: grey, arrays in .npy and TIFF files, and what augmentation makes of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import Tensor

from localfeat.data import arrays
from localfeat.data.bad_files import BadImage
from localfeat.data.datamodule import ImageDataModule
from localfeat.data.decode import common_size, image_size, read_image, read_images
from localfeat.data.labelled import FileImages
from localfeat.data.pixels import Pixels
from localfeat.data.preparation import Preparation
from localfeat.data.randaugment import OPERATIONS
from localfeat.utils.errors import UserError
from tests.helpers.formats import write_array_folder

BANDS = 13


def ramp(*shape: int, dtype: Any = np.uint16, top: int = 10_000) -> np.ndarray:
    return (np.arange(np.prod(shape)).reshape(shape) % top).astype(dtype)


def write_npy(file: Path, values: np.ndarray) -> Path:
    np.save(file.with_suffix(".npy"), values)
    return file.with_suffix(".npy")


def write_tiff(file: Path, values: np.ndarray, **more: Any) -> Path:
    tifffile.imwrite(file.with_suffix(".tif"), values, **more)
    return file.with_suffix(".tif")


def planes(file: Path, values: np.ndarray) -> Path:
    return write_tiff(file, values, photometric="minisblack", planarconfig="separate")


def interleaved(file: Path, values: np.ndarray) -> Path:
    last = np.ascontiguousarray(np.moveaxis(values, 0, -1))
    return write_tiff(file, last, photometric="minisblack", planarconfig="contig", compression="lzw")


def channels_last(file: Path, values: np.ndarray) -> Path:
    return write_npy(file, np.moveaxis(values, 0, -1))


def fortran(file: Path, values: np.ndarray) -> Path:
    return write_npy(file, np.asfortranarray(values))


@pytest.mark.parametrize("write", [write_npy, channels_last, fortran, planes, interleaved])
def test_every_layout_gives_the_same_pixels(write: Callable[[Path, np.ndarray], Path], tmp_path: Path) -> None:
    values = ramp(BANDS, 6, 9)
    file, pixels = write(tmp_path / "x", values), Pixels(BANDS, (1000, 5000))
    found = read_image(file, pixels=pixels)
    expected = ((np.moveaxis(values, 0, -1) - 1000.0) / 4000 * 255).clip(0, 255)
    assert found.dtype == np.float32 and image_size(file, pixels) == found.shape[:2] == (6, 9)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (ramp(2, 4, 4, dtype=np.uint8, top=256), lambda x: x),
        (ramp(2, 4, 4, dtype=np.uint16, top=65_536), lambda x: x >> 8),
        (ramp(2, 4, 4, dtype=">u2", top=65_536), lambda x: x >> 8),
    ],
)
def test_whole_numbers_need_no_range(values: np.ndarray, expected: Any, tmp_path: Path) -> None:
    found = read_image(write_npy(tmp_path / "x", values), pixels=Pixels(2))
    np.testing.assert_array_equal(found, np.moveaxis(expected(values), 0, -1))
    assert found.dtype == np.uint8


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int16])
def test_values_are_clipped_to_their_range(dtype: Any, tmp_path: Path) -> None:
    values = np.array([[-2, 0, 1, 2, 9]], dtype)
    for file in (write_npy(tmp_path / "x", values), write_tiff(tmp_path / "x", values)):
        found = read_image(file, pixels=Pixels(1, (0, 2)))
        np.testing.assert_array_equal(found[0, :, 0], [0, 0, 127.5, 255, 255])


def test_large_values_keep_their_differences(tmp_path: Path) -> None:
    file = write_npy(tmp_path / "x", 1e9 + np.arange(256.0).reshape(16, 16))
    found = read_image(file, pixels=Pixels(1, (1e9, 1e9 + 255)))
    np.testing.assert_array_equal(found[..., 0], np.arange(256).reshape(16, 16))


def test_arrays_are_cut_and_resized_as_images_are(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")
    from_array = read_image(write_npy(tmp_path / "x", picture), (8, 8))
    from_png = read_image(tmp_path / "x.png", (8, 8))
    assert np.abs(from_array.astype(int) - from_png.astype(int)).max() <= 1
    in_floats = read_image(write_npy(tmp_path / "y", picture / 255), (8, 8), Pixels(3, (0, 1)))
    assert np.abs(in_floats - from_png).max() <= 1


def test_grey_is_the_luma_that_pil_computes(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")
    grey = read_image(tmp_path / "x.png", pixels=Pixels(1))
    np.testing.assert_array_equal(grey[..., 0], np.asarray(Image.fromarray(picture).convert("L")))
    prepare = Preparation((9, 7), "none", False, 0, 0, 2, mean=(0,), std=(1,))
    on_device, _ = prepare(torch.from_numpy(picture).permute(2, 0, 1)[None], torch.zeros(1), training=False)
    assert torch.equal((on_device[0, 0] * 255).round().to(torch.uint8), torch.from_numpy(grey[..., 0]))


def test_grey_of_equal_channels_is_exact() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    prepare = Preparation(16, "none", False, 0, 0, 2, mean=(0,), std=(1,))
    found, _ = prepare(values.expand(-1, 3, -1, -1), torch.zeros(1), training=False)
    assert torch.equal((found * 255).round().to(torch.uint8), values)


def written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def header(file: Path, shape: str, kind: str = "|u1") -> Path:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (117 - len(text)) + b"\n"
    return written(file.with_suffix(".npy"), b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)


def rgb_png(file: Path) -> Path:
    Image.new("RGB", (4, 4)).save(file.with_suffix(".png"))
    return file.with_suffix(".png")


WRONG: dict[str, tuple[Callable[[Path], Path], Pixels, str]] = {
    "another number of channels": (
        lambda file: write_npy(file, ramp(4, 6, 9)),
        Pixels(13),
        "it has the shape (4, 6, 9), and in_chans=13 channels first or last are needed; for 4 channels set in_chans=4",
    ),
    "one band of many": (lambda file: write_npy(file, ramp(6, 9)), Pixels(13), "it has the shape (6, 9)"),
    "floats without a range": (
        lambda file: write_npy(file, ramp(6, 9, dtype=np.float32)),
        Pixels(1),
        "it holds float32 values, whose range is unknown: dataset.value_range=[low,high]",
    ),
    "nan": (lambda file: write_npy(file, np.full((6, 9), np.nan)), Pixels(1, (0, 1)), "it holds NaN"),
    "complex": (lambda file: write_npy(file, np.ones((6, 9), complex)), Pixels(1, (0, 1)), "complex128 values"),
    "objects": (
        lambda file: write_npy(file, np.array([[{}]], dtype=object)),
        Pixels(1, (0, 1)),
        "it holds object values, not real numbers",
    ),
    "records of a kilobyte": (
        lambda file: header(file, "(500, 500, 13)", "|V9999"),
        Pixels(13),
        "it holds |V9999 values, not real numbers",
    ),
    "white is zero": (
        lambda file: write_tiff(file, ramp(6, 9), photometric="miniswhite"),
        Pixels(1, (0, 1)),
        "its values are no brightness (miniswhite)",
    ),
    "turned": (
        lambda file: write_tiff(file, ramp(6, 9), extratags=[(274, 3, 1, 6, True)]),
        Pixels(1, (0, 1)),
        "it is stored turned or mirrored",
    ),
    "empty": (lambda file: write_npy(file, np.ones((0, 9))), Pixels(1, (0, 1)), "it has the shape (0, 9)"),
    "a huge claim": (
        lambda file: header(file, "(1000000, 1000000, 13)"),
        Pixels(13),
        "it has the shape (1000000, 1000000, 13): 1 to 400,000,000 values can be read",
    ),
    "no array": (lambda file: written(file.with_suffix(".npy"), b"\x80\x04 pickled"), Pixels(1), "magic string"),
    "cut short": (lambda file: header(file, "(6, 9)"), Pixels(1), "x.npy"),
    "no tiff": (lambda file: written(file.with_suffix(".tif"), b"II*"), Pixels(13), "x.tif"),
    "a png of thirteen bands": (
        rgb_png,
        Pixels(13),
        "in_chans=13 needs .npy or TIFF files",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_end_in_one_line(case: str, tmp_path: Path) -> None:
    write, pixels, said = WRONG[case]
    file = write(tmp_path / "x")
    with pytest.raises(BadImage) as error:
        read_image(file, pixels=pixels)
    assert said in str(error.value) and str(error.value).startswith("cannot read the image ")
    assert "\n" not in str(error.value)


def test_without_tifffile_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = planes(tmp_path / "x", ramp(BANDS, 6, 9))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UserError, match=r"pip install 'localfeat\[tiff\]'") as error:
        read_image(file, pixels=Pixels(BANDS))
    assert not isinstance(error.value, BadImage)


def test_ordinary_tiffs_are_left_to_pil(tmp_path: Path) -> None:
    rgb = write_tiff(tmp_path / "x", ramp(6, 9, 3, dtype=np.uint8, top=256), photometric="rgb")
    assert not arrays.holds_array(rgb, Pixels(3)) and not arrays.holds_array(rgb, Pixels(1))
    assert arrays.holds_array(rgb, Pixels(3, (0, 255)))
    np.testing.assert_array_equal(read_image(rgb), read_image(rgb, pixels=Pixels(3, (0, 255))))


def test_a_folder_of_arrays_in_memory_and_from_files(tmp_path: Path) -> None:
    write_array_folder(tmp_path, channels=BANDS, size=(16, 24))
    pixels, paths = Pixels(BANDS, (0, 10_000)), sorted((tmp_path / "train").rglob("*.npy"))
    assert common_size(paths, pixels=pixels) == (16, 24)
    together, kept = read_images(paths, (16, 24), pixels, resized=False)
    assert together.dtype == torch.float32 and together.shape == (len(paths), BANDS, 16, 24) and len(kept) == len(paths)
    single, _ = FileImages(paths, torch.zeros(len(paths)), (16, 24), pixels=pixels).fetch(torch.arange(len(paths)))
    assert torch.equal(single, together)
    options = {"in_chans": BANDS, "value_range": (0, 10_000), "batch_size": 4, "val_fraction": 0, "image_size": 16}
    data = ImageDataModule("image_folder", tmp_path, **options)  # type: ignore[arg-type]
    assert data.source.example.shape == (BANDS, 16, 24) and data.source.example.dtype == torch.float32
    images, labels = data.prepare(*next(iter(data.train_dataloader())), training=True)
    assert images.shape == (4, BANDS, 16, 16) and labels.shape == (4,)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"value_range": (0, 1)}, "0.npy lie outside dataset.value_range=[0,1]"),
        ({}, "0.npy end at "),
        ({"value_range": (0, 10_000)}, None),
    ],
)
def test_a_range_that_hardly_fits_is_told(
    options: dict[str, Any], said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_array_folder(tmp_path, channels=2, size=(8, 8))
    ImageDataModule("image_folder", tmp_path, in_chans=2, batch_size=4, val_fraction=0, **options).train_dataloader()
    warned = capsys.readouterr().err
    assert warned == "" if said is None else warned.startswith("warning: ") and said in warned


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 2, 13])
def test_operations_treat_channels_alike(name: str, channels: int) -> None:
    """A stack of one grey image stays a stack of one grey image, and is changed as that image alone."""
    operation, magnitude = OPERATIONS[name]
    grey = torch.randint(0, 256, (3, 1, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    level, sign, fill = torch.tensor([2.0, 5.0, 9.0]), torch.tensor([1.0, -1.0, 1.0]), torch.full((channels,), 100.0)
    alone = operation(grey, magnitude(level, sign), fill[:1])
    stack: Tensor = operation(grey.repeat(1, channels, 1, 1), magnitude(level, sign), fill)
    assert stack.shape == (3, channels, 12, 10) and torch.equal(stack, alone.expand_as(stack))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"in_chans": 0}, "in_chans=0: images have a whole number of channels, at least 1"),
        ({"value_range": (1, 1)}, r"value_range=\[1, 1\]: give the values that become black and white, \[low,high\]"),
        ({"value_range": (1, 2, 3)}, r"value_range=\[1, 2, 3\]"),
        ({"value_range": (0, float("inf"))}, r"value_range=\[0, inf\]"),
        ({"value_range": (0, 1e-40)}, r"value_range=\[0, 1e-40\]"),
        ({"in_chans": 2, "mean": (0.1,), "std": (0.1,)}, "in_chans=2 needs a value per channel"),
        ({"in_chans": 5}, "in_chans=5: digits has images of 3 channels; it can be 3, or 1 for grey"),
        ({"value_range": (0, 1)}, "value_range=.* is for the .npy and TIFF files of an image folder, not for digits"),
    ],
)
def test_mistakes_are_named_at_construction(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ImageDataModule("digits", **options)

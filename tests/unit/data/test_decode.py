"""Decoded pixels are those that an image viewer shows."""

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from localfeat.data.decode import common_size, image_size, read_image
from localfeat.data.files import list_images
from localfeat.utils.errors import UserError

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(path: Path, picture: Image.Image, **options: Any) -> np.ndarray:
    picture.save(path, **options)
    return read_image(path)


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.png.*replace or delete"):
        read_image(tmp_path / "x.png")


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    opaque = Image.fromarray(np.dstack([rgb(GREY), np.full_like(GREY, 255)]))
    pictures = {"L": Image.fromarray(GREY), "I;16": deep, "RGBA": opaque, "P": Image.fromarray(GREY).convert("P")}
    for mode, picture in {**pictures, "LA": opaque.convert("LA")}.items():
        np.testing.assert_array_equal(saved(tmp_path / "x.png", picture), rgb(GREY), err_msg=mode)
    ink = saved(tmp_path / "x.jpg", Image.fromarray(rgb(GREY)).convert("CMYK"), quality=100)
    assert np.abs(ink.astype(int) - rgb(GREY)).max() < 8


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_exif_says(orientation: int, suffix: str, tmp_path: Path) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:, :16, 0], upright[:8, :, 1], upright[:, 16:, 2] = 255, 255, 255
    # what a camera stores, so that turning it by its orientation gives the upright picture
    undo: dict[int, Any] = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
        8: lambda x: np.rot90(x, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    exif = Image.Exif()
    exif[0x112] = orientation
    got = saved(tmp_path / f"x.{suffix}", stored, exif=exif, quality=95)
    assert image_size(tmp_path / f"x.{suffix}") == got.shape[:2] == (16, 32)
    inside = (slice(4, None, 8), slice(4, None, 8))  # away from edges, which JPEG blurs
    assert np.abs(got[inside].astype(int) - upright[inside]).max() < 40
    np.testing.assert_array_equal(read_image(tmp_path / f"x.{suffix}", (16, 24)), got[:, 4:28])


def test_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    picture = Image.fromarray(rgb(GREY)[:8])
    for exif in (b"Exif\0\0damaged", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"):
        assert saved(tmp_path / "x.png", picture, exif=exif).shape == (8, 16, 3)
    exif = Image.Exif()
    exif[0x112] = 77
    assert saved(tmp_path / "x.png", picture, exif=exif).shape == (8, 16, 3)


def test_transparency_is_composed_onto_white(tmp_path: Path) -> None:
    for hidden in (0, 255):  # a viewer does not show the colour of transparent pixels
        picture = np.full((16, 16, 4), hidden, np.uint8)
        picture[..., 3] = 0
        picture[4:12, 4:12] = (0, 0, 0, 255)
        expected = np.full((16, 16, 3), 255, np.uint8)
        expected[4:12, 4:12] = 0
        for suffix in ("png", "webp", "tif"):
            got = saved(tmp_path / f"x.{suffix}", Image.fromarray(picture), **({"lossless": True} | {}))
            np.testing.assert_array_equal(got, expected)
    half = np.dstack([GREY, np.full_like(GREY, 51)])
    np.testing.assert_allclose(saved(tmp_path / "x.png", Image.fromarray(half)), rgb(204 + GREY // 5), atol=1)
    palette = Image.fromarray(GREY % 2).convert("P")
    palette.putpalette([9, 8, 7, 1, 2, 3])
    for suffix in ("png", "gif"):
        got = saved(tmp_path / f"x.{suffix}", palette, transparency=0)
        assert got[0, 0].tolist() == [255, 255, 255] and got[0, 1].tolist() == [1, 2, 3]


def test_public_reports_of_formats(tmp_path: Path) -> None:
    """Photos of drones and phones that are MPO inside (yolov5 2446, deepface 1515); palettes with alpha in bytes."""
    first, second = (Image.new("RGB", (16, 8), colour) for colour in ((200, 10, 10), (10, 10, 200)))
    exif = Image.Exif()
    exif[0x112] = 6
    for suffix in ("jpg", "mpo"):
        first.save(tmp_path / f"x.{suffix}", "MPO", save_all=True, append_images=[second], exif=exif)
        with Image.open(tmp_path / f"x.{suffix}") as opened:
            assert opened.format == "MPO"
        got = read_image(tmp_path / f"x.{suffix}")
        assert got.shape == (16, 8, 3) == (*image_size(tmp_path / f"x.{suffix}"), 3)
        assert np.abs(got.astype(int) - (200, 10, 10)).max() < 10
    assert list_images(tmp_path) == [tmp_path / "x.jpg", tmp_path / "x.mpo"]
    palette = Image.fromarray(GREY % 2).convert("P")
    palette.putpalette([9, 8, 7, 1, 2, 3])
    got = saved(tmp_path / "x.png", palette, transparency=bytes([0, 255]))  # University1652-Baseline 17
    assert got[0, 0].tolist() == [255, 255, 255] and got[0, 1].tolist() == [1, 2, 3]


def test_deep_greys_never_fall(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    for suffix in ("png", "tif", "pgm"):
        np.testing.assert_array_equal(saved(tmp_path / f"x.{suffix}", Image.fromarray(ramp)), rgb(GREY))
    got = saved(tmp_path / "x.png", Image.fromarray(ramp), transparency=512)
    assert got[0, :4, 0].tolist() == [0, 1, 255, 3]  # the grey that a PNG calls transparent, over white
    white_is_zero = TiffImagePlugin.ImageFileDirectory_v2()
    white_is_zero[262] = 0
    np.testing.assert_array_equal(
        saved(tmp_path / "x.tif", Image.fromarray(ramp), tiffinfo=white_is_zero), rgb(255 - GREY)
    )


@pytest.mark.parametrize("pixels", [np.int32, np.float32])
def test_pixels_without_a_range_are_refused(pixels: type, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pixels, whose range is unknown"):
        saved(tmp_path / "x.tif", Image.fromarray(GREY.astype(pixels) * 512))


def test_a_picture_of_one_line_needs_little_memory(tmp_path: Path) -> None:
    Image.new("RGB", (40_000, 1), (9, 9, 9)).save(tmp_path / "x.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_image(tmp_path / "x.png", (256, 256)).tolist() == np.full((256, 256, 3), 9).tolist()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_the_centre_is_kept(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", (5, 5)).tolist() == np.full((5, 5, 3), 200).tolist()
    assert common_size([tmp_path / "x.png"]) == (10, 30)

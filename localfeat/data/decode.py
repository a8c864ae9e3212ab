"""Decode image files to arrays of pixels; every bad file ends in one line that names it."""

import errno
import functools
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch

# Image.open would import the plugins on first use, in several threads at once.
from PIL import (  # noqa: F401
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)
from torch import Tensor

from localfeat.data import arrays
from localfeat.data.bad_files import BadFiles, BadImage
from localfeat.data.batched_transforms import centre, resize
from localfeat.data.pixels import RGB, Pixels, Unfit
from localfeat.utils.errors import RunFailed, UserError
from localfeat.utils.sizes import central_part
from localfeat.utils.text import shown

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".mpo", ".bmp", ".dib", ".webp", ".gif"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".npy"}
)
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
"""Formats that a file with one of these suffixes may have; JPEG includes MPO. PIL goes by content: it would hand an EPS
called .png to ghostscript."""
BEHIND_TRANSPARENCY = (255, 255, 255, 255)
"""The colour, white, that transparent pixels are composed onto."""
MAX_PIXELS = 100_000_000
"""Limit for one image: 400 MB as RGBA, and as much again while it is composed, times eight, as so many are decoded at a
time. A small file can claim any size."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit above is an error
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # about tags that no pixel depends on

_DECODE_THREADS = 8  # PIL releases the GIL while it decodes
_CHUNK = 256
_Result = TypeVar("_Result")


def read_image(path: Path, size: tuple[int, int] | None = None, pixels: Pixels = RGB) -> np.ndarray:
    """Decode ``path`` to a writable array (H, W, C) of ``pixels.dtype``, the picture that an image viewer shows.

    With ``size`` (height, width) the largest central part of that aspect is kept and resized to it (bicubic,
    antialiased). The picture is turned as its EXIF orientation says, transparency is composed onto white
    (``BEHIND_TRANSPARENCY``), of 12- and 16-bit pixels the upper 8 bits are kept, grey is ITU-R 601-2 luma. Animations
    give their first frame; colour profiles are not applied. For ``.npy`` files and TIFF files with other than one or
    three channels, or with a ``value_range``, see `arrays.read_array`.

    Raises:
        BadImage: none of the ``FORMATS``, damaged, truncated, more than ``MAX_PIXELS``, pixels without a known range,
            another number of channels, or not a regular file.
        RunFailed: the system cannot read the file: missing, forbidden, a failing disk.
        UserError: the file needs a package that is not installed.
    """
    if arrays.holds_array(path, pixels):
        return _read_array(path, size, pixels)
    with _opened(path) as file:
        if pixels.channels not in (1, 3):
            raise Unfit(f"in_chans={pixels.channels} needs .npy or TIFF files")
        orientation = _orientation(file)
        turned, swapped = orientation > 1, orientation > 4
        stored = size if size is None or not swapped else size[::-1]
        image = file if stored is None else _centre(file, stored)  # first, as turning and composing copy all pixels
        image = _to_rgb(ImageOps.exif_transpose(image) if turned else image, file)
        if pixels.channels == 1:
            image = image.convert("L")
        if size is not None and image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.BICUBIC)
        decoded = np.array(image).reshape(image.height, image.width, pixels.channels)
        return decoded if pixels.dtype == torch.uint8 else decoded.astype(np.float32)


def _read_array(path: Path, size: tuple[int, int] | None, pixels: Pixels) -> np.ndarray:
    with _naming(path), _regular_file(path) as file:
        values = pixels.of(arrays.read_array(file, path, pixels.channels))
    if size is None or values.shape[:2] == size:
        return values
    part = centre(torch.from_numpy(values).permute(2, 0, 1)[None], size)
    resized = resize(part.float(), size)[0].permute(1, 2, 0)
    return (resized.round() if pixels.dtype == torch.uint8 else resized).to(pixels.dtype).numpy()


def image_size(path: Path, pixels: Pixels = RGB) -> tuple[int, int]:
    """Return (height, width) of what `read_image` gives, from the file's header; raise as it does."""
    if arrays.holds_array(path, pixels):
        with _naming(path), _regular_file(path) as opened:
            return arrays.array_size(opened, path, pixels.channels)
    with _opened(path) as file:
        return (file.width, file.height) if _orientation(file) > 4 else (file.height, file.width)


def common_size(paths: Sequence[Path], skip_bad: bool = False, pixels: Pixels = RGB) -> tuple[int, int] | None:
    """Return the (height, width) that all files share, or None if they differ.

    With ``skip_bad``, ignore files whose header cannot be read.
    """
    size = functools.partial(image_size, pixels=pixels)
    found = _in_threads(_keeping_errors(size) if skip_bad else size, paths)
    sizes = {size for size in found if not isinstance(size, BadImage)}
    return sizes.pop() if len(sizes) == 1 else None


def read_images(
    paths: Sequence[Path],
    size: tuple[int, int],
    pixels: Pixels = RGB,
    *,
    resized: bool,
    bad: BadFiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Read files into one tensor (M, C, height, width), and return it with their positions (M,) in ``paths``.

    With ``resized`` each is cut and resized, see `read_image`; otherwise each must already have that size. Files that
    cannot be decoded are left out and reported by ``bad``; without ``bad`` the first of them is an error.
    """

    def decoded(path: Path) -> np.ndarray:
        image = read_image(path, size if resized else None, pixels)
        if image.shape[:2] != size:
            raise BadImage(f"{shown(path)} has {image.shape[1]} x {image.shape[0]} pixels, unlike its header")
        return image

    images = torch.empty(len(paths), pixels.channels, *size, dtype=pixels.dtype)
    kept: list[int] = []
    for index, image in enumerate(_in_threads(_keeping_errors(decoded) if bad else decoded, paths)):
        if isinstance(image, np.ndarray):
            images[len(kept)] = torch.from_numpy(image).permute(2, 0, 1)
            kept.append(index)
        elif bad is not None:
            bad.leave_out(image)
    return images[: len(kept)], torch.tensor(kept, dtype=torch.int64)


def _keeping_errors(function: Callable[[Path], _Result]) -> Callable[[Path], _Result | BadImage]:
    """Wrap ``function`` so that it returns a ``BadImage`` instead of raising it."""

    def attempt(path: Path) -> _Result | BadImage:
        try:
            return function(path)
        except BadImage as error:
            return error

    return attempt


def _in_threads(function: Callable[[Path], _Result], paths: Sequence[Path]) -> Iterator[_Result]:
    """Map ``function`` over ``paths`` in threads, by chunks: a future per small file costs more than reading it."""
    chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
    pool = ThreadPoolExecutor(_DECODE_THREADS)
    try:
        # A few chunks at a time, so that finished images wait in a queue of bounded size.
        for start in range(0, len(chunks), _DECODE_THREADS):
            group = chunks[start : start + _DECODE_THREADS]
            for results in pool.map(lambda chunk: [function(path) for path in chunk], group):
                yield from results
    finally:
        pool.shutdown(cancel_futures=True)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8, that is still to be applied, without decoding pixels.

    PIL turns TIFF files itself. A PNG may hold EXIF data behind its pixels: that is not looked for.
    """
    before_pixels = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"} & image.info.keys()
    if image.format == "TIFF" or (image.format == "PNG" and not before_pixels):
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data say nothing, as in viewers
        return 1
    return found if found in range(1, 9) else 1


def _to_rgb(image: Image.Image, file: Image.Image) -> Image.Image:
    """Return ``image``, made of the pixels of ``file``, as RGB."""
    if image.mode == "F":
        raise ValueError("it holds floating-point pixels, whose range is unknown")
    if image.mode == "I" and file.format == "TIFF":
        raise ValueError("it holds signed or 32-bit pixels, whose range is unknown")
    if image.mode.startswith("I"):  # `convert` would clip it to white
        image = _upper_bits(image, getattr(file, "tag_v2", {}))
    if image.has_transparency_data:
        below = Image.new("RGBA", image.size, BEHIND_TRANSPARENCY)
        below.alpha_composite(image.convert("RGBA"))
        image = below
    return image.convert("RGB")


def _upper_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Return the upper 8 bits of grey pixels of 12 or 16 bits, whose mode is "I" or begins with "I;16".

    Args:
        image: the pixels; in a PNG one grey may be transparent.
        tags: those of a TIFF.
    """
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    deep = np.asarray(image)
    grey = (deep >> (bits - 8)).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # 0 is white; PIL inverts 8-bit pixels only
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[deep == transparent] = BEHIND_TRANSPARENCY[0]
    return Image.fromarray(grey)


def _centre(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    top, left, height, width = central_part(image.height, image.width, size)
    return image.crop((left, top, left + width, top + height))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open the image in ``path`` and check its header, without decoding its pixels; errors name the file."""
    # PIL does not map a file object into memory: a mapped file truncated meanwhile would kill the process.
    with _naming(path), _regular_file(path) as file, Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        yield image


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn every error of a decoder into one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Unfit as error:
        raise BadImage(f"cannot read the image {shown(path)}: {error}") from error
    except MemoryError as error:
        raise RunFailed(f"{shown(path)} cannot be decoded: memory has run out") from error
    except UnidentifiedImageError as error:
        raise _bad(path, f"it is none of {', '.join(FORMATS)}, or damaged at its beginning") from error
    except Image.DecompressionBombError as error:
        raise _bad(path, f"it has more than {MAX_PIXELS:,} pixels, which is the limit") from error
    except Exception as error:  # decoders raise nearly anything for damaged bytes
        # EINVAL comes from a damaged header that holds a negative position.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise RunFailed(f"{shown(path)} cannot be read ({error.strerror})") from error
        raise _bad(path, str(error) or type(error).__name__) from error


def _regular_file(path: Path) -> BinaryIO:
    """Open ``path`` for reading, without ever waiting for a pipe or waking a device."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is not a regular file")
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def _bad(path: Path, reason: str) -> BadImage:
    reason = shown(" ".join(reason.split())).rstrip(".")
    return BadImage(f"cannot read the image {shown(path)}: {reason}; replace or delete this file")

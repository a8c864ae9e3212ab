"""One image file to one uint8 RGB array; every way a file can be bad ends in a ``UserError`` naming it."""

import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localfeat.errors import UserError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})

_DECODE_THREADS = 8  # PIL releases the GIL while it decodes
_CHUNK = 256
_Result = TypeVar("_Result")


def read_image(path: Path, size: int | None = None) -> np.ndarray:
    """Decode ``path`` to a writable uint8 RGB array (H, W, 3).

    With ``size`` the shorter side is resized to it (bicubic, antialiased) and the centre square is kept, so the
    result is (size, size, 3). Grey, palette, RGBA (alpha dropped), CMYK and 16-bit files become RGB; of an
    animation the first frame is taken.
    """
    with _naming(path), Image.open(path) as file:
        image = _to_rgb(file)
        return np.array(image if size is None else _centre_square(image, size))


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from the file's header."""
    with _naming(path), Image.open(path) as file:
        return file.height, file.width


def common_size(paths: Sequence[Path]) -> tuple[int, int] | None:
    """The (height, width) that all files share, or None if they differ."""
    sizes = set(_in_threads(image_size, paths))
    return sizes.pop() if len(sizes) == 1 else None


def read_images(paths: Sequence[Path], height: int, width: int, resize: bool) -> Tensor:
    """All files as one uint8 tensor (N, 3, height, width).

    ``resize`` brings each to the square height == width; without it each must have that size already.
    """
    images = torch.empty(len(paths), 3, height, width, dtype=torch.uint8)
    decoded = _in_threads(lambda path: read_image(path, height if resize else None), paths)
    for index, pixels in enumerate(decoded):
        images[index] = torch.from_numpy(pixels).permute(2, 0, 1)
    return images


def _in_threads(function: Callable[[Path], _Result], paths: Sequence[Path]) -> Iterator[_Result]:
    """``map`` by threads in chunks: a future per small file would cost more than reading it."""
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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; `convert` would clip it to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("it holds floating-point pixels, whose range is unknown")
    return image.convert("RGB")


def _centre_square(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what PIL raises for a bad file into a ``UserError`` with the file's name."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read the image {path}: {reason}; replace or delete this file") from error

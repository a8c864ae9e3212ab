"""Read arrays of any number of channels from ``.npy`` and TIFF files.

TIFF files other than ordinary grey and RGB images are read by tifffile, an extra.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from localfeat.data.pixels import NUMBERS, Pixels, Unfit
from localfeat.utils.errors import UserError

MAX_VALUES = 400_000_000
"""Limit for one array, so many values as the largest RGBA image has. A small file can claim any size."""

_NPY, _TIFF = (".npy",), (".tif", ".tiff")


def holds_array(path: Path, pixels: Pixels) -> bool:
    """Return whether a file is read as an array: ``.npy`` always, TIFF unless it is an ordinary grey or RGB image."""
    suffix = path.suffix.lower()
    return suffix in _NPY or (suffix in _TIFF and (pixels.channels not in (1, 3) or pixels.value_range is not None))


def array_size(file: BinaryIO, path: Path, channels: int) -> tuple[int, int]:
    """Return (height, width) from the header; raise as `read_array` does."""
    shape = _npy_shape(file) if path.suffix.lower() in _NPY else _tiff_series(file, path).shape
    axis = _channel_axis(shape, channels)
    height, width = shape if axis is None else (n for i, n in enumerate(shape) if i != axis)
    return height, width


def read_array(file: BinaryIO, path: Path, channels: int) -> np.ndarray:
    """Return the values of a file as (H, W, channels), of the file's own type.

    An array (H, W) has one channel. Of three axes the first is the channels' if it is ``channels`` long, else the last.

    Raises:
        Unfit: another shape.
        ValueError: more than ``MAX_VALUES`` values, a damaged file, one that needs code to be run.
        UserError: a TIFF file, and tifffile is not installed.
    """
    if path.suffix.lower() in _NPY:
        axis = _channel_axis(_npy_shape(file), channels)
        file.seek(0)
        values = np.lib.format.read_array(file, allow_pickle=False)
    else:
        series = _tiff_series(file, path)
        axis = _channel_axis(series.shape, channels)
        values = series.asarray()
    return values[..., None] if axis is None else np.moveaxis(values, axis, -1)


def _channel_axis(shape: Sequence[int], channels: int) -> int | None:
    """Return the axis of the channels; ``None`` if there is none, as in a single band."""
    shape = tuple(shape)
    if 0 in shape or int(np.prod(shape, dtype=object)) > MAX_VALUES:
        raise ValueError(f"it has the shape {shape}: 1 to {MAX_VALUES:,} values can be read")
    if len(shape) == 2 and channels == 1:
        return None
    if len(shape) == 3 and channels in (shape[0], shape[2]):
        return 0 if shape[0] == channels else 2
    fewest = 1 if len(shape) == 2 else min(shape[0], shape[-1]) if len(shape) == 3 else None
    hint = "" if fewest is None else f"; for {fewest} channel{'s' if fewest > 1 else ''} set in_chans={fewest}"
    raise Unfit(f"it has the shape {shape}, and in_chans={channels} channels first or last are needed{hint}")


def _npy_shape(file: BinaryIO) -> tuple[int, ...]:
    readers: dict[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"it is a .npy file of version {version}")
    shape, _, dtype = readers[version](file)
    if dtype.kind not in NUMBERS:
        raise ValueError(f"it holds {dtype} values, not real numbers")
    return tuple(shape)


def _tiff_series(file: BinaryIO, path: Path) -> Any:
    """Return tifffile's first series of the file's pages: all bands of one image, whatever way they are stored."""
    try:
        import tifffile
    except ImportError:
        raise UserError(
            "TIFF files of many bands or with a value_range are read by tifffile: pip install 'localfeat[tiff]'"
        ) from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it would tell of damage in lines of its own
    series = tifffile.TiffFile(file, name=path.name).series[0]
    page = series.keyframe
    if page.photometric in (tifffile.PHOTOMETRIC.MINISWHITE, tifffile.PHOTOMETRIC.PALETTE):
        raise ValueError(f"its values are no brightness ({tifffile.PHOTOMETRIC(page.photometric).name.lower()})")
    if page.tags.valueof("Orientation", 1) != 1:
        raise ValueError("it is stored turned or mirrored")
    return series

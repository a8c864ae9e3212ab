"""What pixels of a file become: how many channels, and which values are black and white."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from localfeat.utils.channels import check_channels
from localfeat.utils.errors import UserError

NUMBERS = "uif"
"""Kinds of types that pixels may have in a file: whole and floating-point numbers."""


class Unfit(ValueError):
    """Why a sound file does not fit the settings."""


@dataclass(frozen=True)
class Pixels:
    """The pixels that files are read to: uint8, or float32 between 0 and 255 where ``value_range`` is given.

    Args:
        channels: 1 (grey), 3 (RGB), or any number that ``.npy`` and TIFF files have.
        value_range: the values in ``.npy`` and TIFF files that become 0 and 255; those beyond are clipped. ``None``
            takes 8-bit values as they are, and the upper 8 bits of unsigned 16-bit ones.

    Raises:
        UserError: no channel, or a range that is none.
    """

    channels: int = 3
    value_range: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_channels(self.channels)
        given = self.value_range
        if given is not None and not (
            len(given) == 2 and given[0] < given[1] and 0 < 255 / (given[1] - given[0]) < 1e30
        ):
            raise UserError(f"value_range={list(given)}: give the values that become black and white, [low,high]")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the pixels."""
        return torch.uint8 if self.value_range is None else torch.float32

    def of(self, values: np.ndarray) -> np.ndarray:
        """Return the values of a file as pixels of ``dtype``, in a new array.

        Raises:
            ValueError: values without a known range, or NaN.
        """
        if values.dtype.kind not in NUMBERS:
            raise ValueError(f"it holds {values.dtype} values, not real numbers")
        if self.value_range is not None:
            low, high = self.value_range
            scaled = (values.astype(np.float64) - low) * (255 / (high - low))
            if np.isnan(scaled).any():
                raise ValueError("it holds NaN")
            return scaled.clip(0, 255).astype(np.float32)
        if values.dtype == np.uint8:
            return values.copy()
        if values.dtype.kind == "u" and values.dtype.itemsize == 2:
            return (values >> 8).astype(np.uint8)
        raise Unfit(
            f"it holds {values.dtype} values, whose range is unknown: dataset.value_range=[low,high] says which become "
            "black and white"
        )


RGB = Pixels()

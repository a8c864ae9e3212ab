"""Image sizes as they are given: one side in pixels, or height and width."""

from __future__ import annotations

from collections.abc import Sequence

from localfeat.utils.errors import UserError


def sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width for a side, or for height and width.

    Raises:
        UserError: they are not one or two numbers of at least 1.
    """
    given = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    if len(given) != 2 or min(given) < 1:
        raise UserError(f"image_size={as_size(image_size)}: give a side, or [height,width], of at least 1 pixel")
    return given[0], given[1]


def as_size(image_size: int | Sequence[int]) -> str:
    """Return an image size as it is typed: ``224`` for a square, else ``[64,96]``."""
    given = [image_size] if isinstance(image_size, int) else list(image_size)
    return str(given[0]) if len(given) in (1, 2) and len(set(given)) == 1 else f"[{','.join(map(str, given))}]"


def in_pixels(image_size: int | Sequence[int]) -> str:
    """Return an image size for readers: ``224 px``, ``64 x 96 px``."""
    height, width = sides(image_size)
    return f"{height} px" if height == width else f"{height} x {width} px"


def central_part(height: int, width: int, wanted: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the largest central rectangle with the aspect of ``wanted``."""
    scale = min(height / wanted[0], width / wanted[1])
    rows, columns = (max(1, min(have, round(side * scale))) for have, side in zip((height, width), wanted, strict=True))
    return (height - rows) // 2, (width - columns) // 2, rows, columns

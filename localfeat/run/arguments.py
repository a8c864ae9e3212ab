"""Check the arguments of the commands that follow training: numbers and output files."""

from __future__ import annotations

from pathlib import Path

from localfeat.utils.errors import UserError


def whole_number(key: str, text: str, *, least: int) -> int:
    """Return ``text`` as a number of images.

    Raises:
        UserError: ``text`` is not a whole number, or it is below ``least``.
    """
    try:
        number = int(text)
    except ValueError as error:
        raise UserError(f"{key}={text}: it is a number of images, at least {least}") from error
    if number < least:
        raise UserError(f"{key}={text}: it must be at least {least}")
    return number


def check_output(key: str, text: str) -> Path:
    """Return the path of an output file, checked before the work starts rather than after it.

    Raises:
        UserError: its folder does not exist, or the path exists and is not a regular file.
    """
    file = Path(text)
    if not file.parent.is_dir():
        raise UserError(f"{key}={text}: there is no folder {file.parent}")
    if file.exists() and not file.is_file():
        raise UserError(f"{key}={text}: not a regular file; give the path of a file")
    return file

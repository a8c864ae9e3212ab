"""Arguments of the commands that come after training: numbers, and files to be written."""

from __future__ import annotations

from pathlib import Path

from localfeat.utils.errors import UserError


def whole_number(key: str, text: str, *, least: int) -> int:
    """``text`` as a number of images.

    Raises:
        UserError: no whole number, or one below ``least``.
    """
    try:
        number = int(text)
    except ValueError as error:
        raise UserError(f"{key}={text}: it is a number of images, at least {least}") from error
    if number < least:
        raise UserError(f"{key}={text}: it must be at least {least}")
    return number


def check_output(key: str, text: str) -> Path:
    """A file that can be written once there are results: a mistake should not show after minutes.

    Raises:
        UserError: a folder of that name, no folder to put it in, or something else there than a file.
    """
    file = Path(text)
    if not file.parent.is_dir():
        raise UserError(f"{key}={text}: there is no folder {file.parent}")
    if file.exists() and not file.is_file():
        raise UserError(f"{key}={text}: give a file, this is none")
    return file

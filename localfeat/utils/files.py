"""Write files whole or not at all, and report failures in one line."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from localfeat.utils.errors import RunFailed, UserError, contexts

PART = ".part"
"""Suffix of unfinished files; a killed process leaves them behind."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears at ``path`` when the block ends, complete or not at all.

    The content goes to a temporary file in the same folder, which is created if needed, and is renamed once it is on
    disk. Until then, and if anything fails or the machine crashes, ``path`` keeps its old content.

    Raises:
        OSError: an error of the file system, also where a library has wrapped it in another exception.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, 0o666 & ~current_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if type(error) is RuntimeError:  # torch reports a full disk as an unexpected position in the file
            for cause in contexts(error):
                if isinstance(cause, OSError):
                    raise cause from None
        raise
    sync_folder(path.parent)


def write_whole(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path`` as a :func:`whole_file`."""
    with whole_file(path) as file:
        file.write(content)


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not text
        raise UserError(f"{file} cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} cannot be read (it holds no JSON object)")
    return content


def not_a(wanted: str, path: str | Path) -> str:
    """Say why ``path`` is not the ``wanted`` "file" or "folder": it is the other, or there is none."""
    there = "folder" if os.path.isdir(path) else "file" if os.path.exists(path) else None
    return f"it is a {there}, not a {wanted}" if there else f"there is no such {wanted}"


def sync_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to disk, where the file system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_parts(folder: Path) -> None:
    """Remove the unfinished files that killed processes left in ``folder``. No other process may be writing there."""
    for left in folder.glob(f".*{PART}"):
        left.unlink(missing_ok=True)


@contextmanager
def failing_in_one_line(path: str | Path) -> Iterator[None]:
    """Turn an ``OSError`` from writing ``path`` (full disk, missing folder …) into a ``RunFailed``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise RunFailed(f"{path} cannot be written ({reason})") from error


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

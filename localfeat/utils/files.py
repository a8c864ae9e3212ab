"""Files that are written whole or not at all, and what is said when that fails."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from localfeat.utils.errors import RunFailed, contexts

PART = ".part"
"""How the names of unfinished files end; a process that is killed leaves them behind."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that is on disk under the name ``path`` when the block has ended, complete or not at all.

    It is written under another name in the same folder, which is made if need be, and renamed when the disk has it.
    If anything fails the name keeps the file that it had; so it does for a reader meanwhile, and after a crash of the
    machine.

    Raises:
        OSError: of the file system, also where a library has wrapped it in another exception.
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
    """``content`` as a :func:`whole_file`."""
    with whole_file(path) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` on disk, where the file system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_parts(folder: Path) -> None:
    """Remove what killed processes have left of files in ``folder``. No other process may be writing there."""
    for left in folder.glob(f".*{PART}"):
        left.unlink(missing_ok=True)


@contextmanager
def failing_in_one_line(path: str | Path) -> Iterator[None]:
    """Turn an ``OSError`` of writing ``path``, a file of a run, into a ``RunFailed``: full disk, vanished folder …"""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise RunFailed(f"{path} cannot be written ({reason})") from error


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

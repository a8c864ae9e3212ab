"""Files fetched and unpacked so that nothing half done is ever found under a file's name.

One process at a time works on a folder, what it writes gets its name when it is complete, and what a killed process has
left is removed by the next one.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import socket
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from localfeat.utils.files import PART, whole_file
from localfeat.utils.locks import UNSUPPORTED, try_lock
from localfeat.utils.text import shown

LOCK = ".localfeat.lock"
ERRORS = (OSError, EOFError, RuntimeError, ValueError, tarfile.TarError, zlib.error, http.client.HTTPException)
"""What can go wrong while files are fetched and unpacked."""

_NETWORK_TIMEOUT = 30.0  # seconds without a byte; torchvision itself would wait for ever
_POLL = 0.2  # seconds between two looks at a lock


@contextmanager
def sole_writer(root: Path, files: Iterable[str]) -> Iterator[None]:
    """Keep other processes from fetching into ``root``, waiting, and saying so, while one does.

    The folder is made if need be, and removed again if nothing has come into it. The system takes the lock back from
    a process that dies.

    Args:
        files: that may be fetched, relative to ``root``; what a killed process has left of them is removed.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    lock = root / LOCK
    try:
        descriptor = _wait_for(lock)
        try:
            if descriptor is not None:  # else another process may be at work on them
                for name in files:
                    _remove_left_overs(root / name)
            yield
        finally:
            if descriptor is not None:
                with suppress(OSError):
                    lock.unlink()  # whoever waits for it will see that it is gone, and make another
                os.close(descriptor)
    finally:
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _wait_for(lock: Path) -> int | None:
    """A descriptor that holds the lock; None, with a warning, on a file system without locks."""
    said = False
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = try_lock(lock)
        except FileNotFoundError:  # whoever had it has just removed the empty folder
            continue
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            print(
                f"warning: no locks on this file system: two downloads to {shown(lock.parent)} at the same time would "
                "disturb each other",
                file=sys.stderr,
            )
            return None
        if descriptor is not None:
            return descriptor
        if not said:
            print(f"waiting for another process that downloads to {shown(lock.parent)}", file=sys.stderr, flush=True)
            said = True
        time.sleep(_POLL)


def _remove_left_overs(file: Path) -> None:
    for left in file.parent.glob(f".{file.name}.*{PART}"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def fetch(url: str, file: Path, md5: str) -> None:
    """Make sure that ``file`` holds what ``url`` holds; a file of another content is replaced when that has come.

    Raises:
        OSError, RuntimeError, http.client.HTTPException: see ``ERRORS``; ``file`` is then as it was.
    """
    from torchvision.datasets.utils import check_integrity, download_url

    if check_integrity(file, md5):
        return
    beside = Path(tempfile.mkdtemp(dir=file.parent, prefix=f".{file.name}.", suffix=PART))
    try:
        with _timeout(_NETWORK_TIMEOUT):
            download_url(url, str(beside), filename=file.name, md5=md5)
        with (beside / file.name).open("rb") as fetched:
            os.fsync(fetched.fileno())
        os.replace(beside / file.name, file)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def unpack(archive: Path, md5: str, root: Path, wanted: dict[str, str | None]) -> None:
    """Bring the ``wanted`` members (path -> md5) of a .tar.gz, those that are files, to the same paths below ``root``.

    Nothing else in the archive is looked at, so that no name and no link in it leads anywhere.

    Args:
        md5: of the archive, checked on the bytes that are then unpacked.

    Raises:
        OSError, RuntimeError, tarfile.TarError, EOFError, zlib.error: see ``ERRORS``.
    """
    missing = dict(wanted)
    with archive.open("rb") as packed:
        if hashlib.file_digest(packed, _md5).hexdigest() != md5:
            raise RuntimeError(f"{shown(archive)} has another checksum than it should have")
        packed.seek(0)
        with tarfile.open(fileobj=packed, mode="r:gz") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                content = tar.extractfile(member) if name in missing and member.isreg() else None
                if content is not None:
                    with whole_file(root / name) as file:
                        _copy(content, file, missing.pop(name), name)
                if not missing:
                    return
    raise RuntimeError(f"{shown(archive)} lacks {', '.join(missing)}")


def _copy(source: object, file: BinaryIO, md5: str | None, name: str) -> None:
    digest = _md5()
    while chunk := source.read(1 << 20):  # type: ignore[attr-defined]
        file.write(chunk)
        digest.update(chunk)
    if md5 is not None and digest.hexdigest() != md5:
        raise RuntimeError(f"{name} in the archive has another checksum than it should have")


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)  # which is allowed on every machine


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

"""Download and unpack files so that no incomplete file ever appears under its final name.

One process at a time works on a folder. A file gets its name once it is complete, and the next process removes what a
killed one left behind.
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
"""Exceptions that fetching and unpacking may raise."""

_NETWORK_TIMEOUT = 30.0  # seconds without a byte; torchvision itself would wait forever
_POLL = 0.2  # seconds between two looks at a lock


@contextmanager
def sole_writer(root: Path, files: Iterable[str]) -> Iterator[None]:
    """Keep other processes from fetching into ``root``; while one already does, say so and wait.

    The folder is created if needed, and removed again if it stays empty. The system releases the lock of a process
    that dies.

    Args:
        root: folder to fetch into.
        files: paths that may be fetched, relative to ``root``; their leftovers from a killed process are removed.

    Raises:
        OSError: the folder cannot be created or written to.
    """
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    lock = root / LOCK
    try:
        descriptor = _wait_for(lock)
        try:
            if descriptor is not None:  # without the lock another process may be writing them
                for name in files:
                    _remove_left_overs(root / name)
            yield
        finally:
            if descriptor is not None:
                with suppress(OSError):
                    lock.unlink()  # a waiting process will see that it is gone, and create a new one
                os.close(descriptor)
    finally:
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _wait_for(lock: Path) -> int | None:
    """Wait for the lock and return its descriptor; on a file system without locks, warn and return None."""
    said = False
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = try_lock(lock)
        except FileNotFoundError:  # the previous holder has just removed the empty folder
            continue
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            print(
                f"warning: no locks on this file system: two downloads to {shown(lock.parent)} at the same time would "
                "damage each other",
                file=sys.stderr,
            )
            return None
        if descriptor is not None:
            return descriptor
        if not said:
            print(f"waiting for another process to download to {shown(lock.parent)}", file=sys.stderr, flush=True)
            said = True
        time.sleep(_POLL)


def _remove_left_overs(file: Path) -> None:
    for left in file.parent.glob(f".{file.name}.*{PART}"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def fetch(url: str, file: Path, md5: str) -> None:
    """Download ``url`` to ``file`` unless its checksum is already ``md5``; replace it only by a complete download.

    Raises:
        OSError, RuntimeError, http.client.HTTPException: see ``ERRORS``; ``file`` is then unchanged.
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
    """Unpack the ``wanted`` members (path -> md5) of a .tar.gz, regular files only, to the same paths below ``root``.

    Nothing else in the archive is read, so that no name or link in it can lead outside ``root``.

    Args:
        archive: the .tar.gz file.
        md5: checksum of the archive, verified on the same bytes that are then unpacked.
        root: folder to unpack into.
        wanted: path of each member -> its md5, or None if that is unknown.

    Raises:
        OSError, RuntimeError, tarfile.TarError, EOFError, zlib.error: see ``ERRORS``.
    """
    missing = dict(wanted)
    with archive.open("rb") as packed:
        if hashlib.file_digest(packed, _md5).hexdigest() != md5:
            raise RuntimeError(f"{shown(archive)} has the wrong checksum")
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
        raise RuntimeError(f"{name} in the archive has the wrong checksum")


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)  # allowed on FIPS machines too


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

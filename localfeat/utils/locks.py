"""Locks that admit one process at a time; the system releases them when the process dies."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from localfeat.utils.errors import UserError

RUN_LOCK = ".lock"
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}


def try_lock(file: Path) -> int | None:
    """Return an open descriptor that holds the lock on ``file``, or None if another process holds it.

    Closing the descriptor releases the lock. A child that inherits it holds the lock too, even after its parent has
    died. The folder must exist.

    Raises:
        OSError: the file cannot be created, or its file system has no locks.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, file):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the previous holder has removed the file meanwhile: try again with a new one


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def is_locked(file: Path) -> bool:
    """Return whether a process currently holds the lock."""
    if not file.exists():
        return False
    descriptor = try_lock(file)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def check_free(folder: Path) -> None:
    """Refuse a folder in which another process is training.

    Raises:
        UserError: a process is training there; the message names it.
    """
    file = folder / RUN_LOCK
    with suppress(OSError):  # no locks or no permission: `sole_run` will report it
        if is_locked(file):
            raise UserError(_in_use(folder))


def _in_use(folder: Path) -> str:
    return f"{folder} is in use: {_holder(folder / RUN_LOCK)} is training there"


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Keep every other process from training in ``folder``, which is created if needed. Leave no file behind.

    Raises:
        UserError: another process is training there, or the folder is not writable.
        OSError: the folder cannot be written to for another reason, such as a full disk.
    """
    file = folder / RUN_LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = try_lock(file)
    except OSError as error:
        if error.errno in FORBIDDEN:
            raise UserError(f"{folder} cannot be written ({error.strerror})") from error
        if error.errno not in UNSUPPORTED:
            raise
        print(f"warning: no locks on this file system: two runs in {folder} would damage each other", file=sys.stderr)
        yield
        return
    if descriptor is None:
        raise UserError(_in_use(folder))
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with suppress(OSError):  # the folder may be gone
            file.unlink()
        os.close(descriptor)


def _holder(file: Path) -> str:
    try:
        return file.read_text().strip() or "another process"
    except OSError:
        return "another process"

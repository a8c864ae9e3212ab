"""One process at a time: locks that the system takes back from a process that dies."""

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
    """A descriptor that keeps every other process from ``file``'s lock while it is open; None if one has it.

    A child that inherits it holds the lock too, also after its parent's death. The folder must exist.

    Raises:
        OSError: the file cannot be made, or its file system has no locks.
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
        os.close(descriptor)  # whoever had it before has removed it meanwhile: the name is another file, or none


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def is_locked(file: Path) -> bool:
    """Whether a process holds the lock now."""
    if not file.exists():
        return False
    descriptor = try_lock(file)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def check_free(folder: Path) -> None:
    """Refuse a folder in which a process trains now.

    Raises:
        UserError: says which process it is.
    """
    file = folder / RUN_LOCK
    with suppress(OSError):  # no locks, no permission: whoever trains there will be told
        if is_locked(file):
            raise UserError(_in_use(folder))


def _in_use(folder: Path) -> str:
    return f"{folder} is in use: {_holder(folder / RUN_LOCK)} trains there"


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Keep every other process from training in ``folder``, which is made if need be. Leaves no file behind.

    Raises:
        UserError: one is training there, or nobody may write there.
        OSError: the folder cannot be written to for another reason, like a full disk.
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

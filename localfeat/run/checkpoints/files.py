"""Checkpoint files: written whole, verified when read, with the previous one kept until the run has ended."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from localfeat.run.folder import RunFolder
from localfeat.utils.errors import UserError
from localfeat.utils.files import failing_in_one_line, whole_file

NEEDED: dict[str, type | tuple[type, ...]] = {
    "state_dict": Mapping,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "loops": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
    "callbacks": Mapping,
}
"""The entries of every Lightning checkpoint, needed to resume."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin for checkpoint files; writing ``last.ckpt`` keeps the one before as ``previous.ckpt``.

    A kill, a full disk or a crash of the machine leaves either the old or the new file, never a partial one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            RunFailed: the file cannot be written.
        """
        file = Path(path)
        with failing_in_one_line(file), whole_file(file) as part:
            torch.save(checkpoint, part)
            part.flush()
            os.fsync(part.fileno())  # on disk before the old one is replaced
            run = RunFolder(file.parents[1])
            if file == run.last and file.is_file():
                _keep(file, run.previous)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return :func:`read_checkpoint`'s result; code in a file is never run, whatever ``weights_only`` says."""
        return read_checkpoint(Path(path))


def _keep(file: Path, name: Path) -> None:
    """Give ``file`` a second name, so that it survives when another file replaces it."""
    second = name.with_name(f".{name.name}.part")
    second.unlink(missing_ok=True)
    try:
        os.link(file, second)
    except OSError:  # no hard links on this file system
        shutil.copyfile(file, second)
    os.replace(second, name)
    second.unlink(missing_ok=True)  # renaming does nothing if both names are the same file


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Return a checkpoint's content on the CPU; nothing in it is executed, and all checksums are verified.

    Raises:
        UserError: the file is damaged, is not a Lightning checkpoint, or needs code to be read.
    """
    _check_archive(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} needs code to be unpickled, which is refused: it is not a run's checkpoint") from error
    except Exception as error:  # torch's readers raise anything for other files
        raise UserError(f"{file} cannot be read: it is damaged") from error
    for key, kind in NEEDED.items():
        if not isinstance(content, Mapping) or not isinstance(content.get(key), kind):
            raise UserError(f"{file} is not a run's checkpoint: it has no {key}")
    return dict(content)


def _check_archive(file: Path) -> None:
    """Refuse a compressed or damaged archive; torch does not verify the checksums of its zip archives."""
    try:
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise UserError(f"{file} is not a run's checkpoint: it is compressed")  # it may unpack to any size
            damaged = archive.testzip()
    except (OSError, EOFError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read ({str(error) or type(error).__name__}): it is damaged") from error
    if damaged is not None:
        raise UserError(f"{file} cannot be read (wrong checksum of {damaged}): it is damaged")


def newest_sound(folder: RunFolder) -> tuple[Path | None, int]:
    """Return the newest sound checkpoint to resume from and its number of batches; (None, 0) without checkpoints.

    A damaged ``last.ckpt`` is reported on stderr and replaced by the previous one.

    Raises:
        UserError: all checkpoints are damaged.
    """
    complaints: list[str] = []
    for file in folder.resumable():
        try:
            batches = read_checkpoint(file)["global_step"]
        except UserError as error:
            complaints.append(str(error))
            continue
        if complaints:
            print(f"warning: {complaints[0]}; the previous one, of batch {batches}, replaces it", file=sys.stderr)
        os.replace(file, folder.last)  # or the next checkpoint would keep the damaged one as previous
        return folder.last, batches
    if complaints:
        raise UserError(f"{'; '.join(complaints)}; remove {folder.checkpoints} to start the run from the beginning")
    return None, 0


def remove_previous(folder: RunFolder) -> None:
    """Remove ``previous.ckpt``, which only an unfinished run needs; a failure is only a warning."""
    file = folder.previous
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        print(f"warning: {file} cannot be removed ({error.strerror})", file=sys.stderr)

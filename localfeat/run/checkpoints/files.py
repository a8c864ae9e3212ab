"""Checkpoint files: written whole, verified when read, the one before kept until the run has ended."""

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
"""What every checkpoint of Lightning holds, and what a run goes on from."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin for checkpoint files. What is called ``last.ckpt`` keeps the one before it beside it.

    A kill, a full disk or a crash of the machine leave the file that was there or the new one, never a part.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            RunFailed: it cannot be written.
        """
        file = Path(path)
        with failing_in_one_line(file), whole_file(file) as part:
            torch.save(checkpoint, part)
            part.flush()
            os.fsync(part.fileno())  # on disk before the older one goes
            run = RunFolder(file.parents[1])
            if file == run.last and file.is_file():
                _keep(file, run.previous)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See :func:`read_checkpoint`; code in a file is never run, whatever ``weights_only`` says."""
        return read_checkpoint(Path(path))


def _keep(file: Path, name: Path) -> None:
    """Give ``file`` another name, too, so that it stays when its own goes to another file."""
    second = name.with_name(f".{name.name}.part")
    second.unlink(missing_ok=True)
    try:
        os.link(file, second)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, second)
    os.replace(second, name)
    second.unlink(missing_ok=True)  # a rename between two names of the same file does nothing


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint's content on the CPU. Nothing in it is executed; every byte is compared with its checksum.

    Raises:
        UserError: a file that is damaged, is none of Lightning's checkpoints, or needs code to be read.
    """
    _check_archive(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} needs code to be unpickled, which is refused: it is no checkpoint of a run") from error
    except Exception as error:  # torch's readers raise anything on what is no checkpoint
        raise UserError(f"{file} cannot be read ({type(error).__name__}): it is damaged") from error
    for key, kind in NEEDED.items():
        if not isinstance(content, Mapping) or not isinstance(content.get(key), kind):
            raise UserError(f"{file} is no checkpoint of a run: it has no {key}")
    return dict(content)


def _check_archive(file: Path) -> None:
    """Checkpoints are zip archives without compression; torch itself does not look at their checksums."""
    try:
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise UserError(f"{file} is no checkpoint of a run: it is compressed")  # and may unpack to any size
            damaged = archive.testzip()
    except (OSError, EOFError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read ({str(error) or type(error).__name__}): it is damaged") from error
    if damaged is not None:
        raise UserError(f"{file} cannot be read (wrong checksum of {damaged}): it is damaged")


def newest_sound(folder: RunFolder) -> tuple[Path | None, int]:
    """The newest checkpoint that a run in ``folder`` can go on from, and the batches behind it; (None, 0) without one.

    A damaged ``last.ckpt`` is named on stderr, and the one before it takes its place.

    Raises:
        UserError: all of them are damaged.
    """
    complaints: list[str] = []
    for file in folder.resumable():
        try:
            batches = read_checkpoint(file)["global_step"]
        except UserError as error:
            complaints.append(str(error))
            continue
        if complaints:
            print(f"warning: {complaints[0]}; the one before it, of batch {batches}, takes its place", file=sys.stderr)
        os.replace(file, folder.last)  # or the next checkpoint would take the damaged one for previous
        return folder.last, batches
    if complaints:
        raise UserError(f"{'; '.join(complaints)}; without {folder.checkpoints} the run begins anew")
    return None, 0


def remove_previous(folder: RunFolder) -> None:
    """Only a run that is cut short goes on from it: that it stays is no reason to call a complete run failed."""
    file = folder.previous
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        print(f"warning: {file} cannot be removed ({error.strerror})", file=sys.stderr)

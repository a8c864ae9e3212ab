"""Unlabelled images of a folder, for prediction."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from localfeat.data.bad_files import BadFiles, BadImage
from localfeat.data.decode import IMAGE_SUFFIXES
from localfeat.data.labelled import Batch, FileImages, batch_loader
from localfeat.utils.errors import UserError
from localfeat.utils.text import shown


def list_images(folder: str | Path) -> list[Path]:
    """Return all image files below ``folder``, sorted by path; hidden files and folders are skipped.

    Raises:
        UserError: the folder does not exist or holds no image, or an entry named like an image is not a file.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise UserError(f"no folder {shown(folder)}; give a folder with images")
    paths = image_paths(folder)
    if not paths:
        raise UserError(f"no image in {shown(folder)} or below it; looked for {' '.join(sorted(IMAGE_SUFFIXES))}")
    return paths


def image_paths(folder: Path, bad: BadFiles | None = None) -> list[Path]:
    """Return the image files below ``folder``, sorted, without hidden ones and linked folders; possibly none.

    An entry that is named like an image but is neither a file nor a folder (a broken link, a pipe) is left out and
    reported by ``bad``; without ``bad`` it is an error.

    Raises:
        UserError: such an entry, or a folder that cannot be read.
    """
    found = []
    try:
        for entry in _visible_entries(folder):
            path = Path(entry.path)
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            if entry.is_file(follow_symlinks=False) or os.path.isfile(path):
                found.append(path)
            elif not os.path.isdir(path):
                _refuse(entry, bad)
    except OSError as error:
        raise UserError(f"{shown(error.filename or folder)} cannot be read ({error.strerror})") from error
    return sorted(found)


def _visible_entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield everything below ``folder`` that is not a folder; hidden entries, and all below them, are skipped."""
    pending: list[str | Path] = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    yield entry


def _refuse(entry: os.DirEntry[str], bad: BadFiles | None) -> None:
    what = "a link that does not lead to a file" if entry.is_symlink() else "a pipe, socket or device"
    error = BadImage(f"cannot read the image {shown(entry.path)}: it is {what}; replace or delete it")
    if bad is None:
        raise error
    bad.leave_out(error)


def image_files_loader(paths: Sequence[Path], image_size: int, batch_size: int, num_workers: int) -> DataLoader[Batch]:
    """Return a loader of image files of any size, in the order of ``paths``.

    It yields uint8 images (B, 3, image_size, image_size), their shorter side resized and the centre kept, and
    their positions (B,) int64 in ``paths``. ``num_workers`` processes decode; with 0 the calling process does.
    """
    if batch_size < 1 or image_size < 1:
        raise UserError(f"batch_size={batch_size}, image_size={image_size}: both must be at least 1")
    return batch_loader(FileImages(paths, torch.arange(len(paths)), image_size), num_workers, batch_size=batch_size)

"""Images of a bare folder, without labels, for prediction."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from localfeat.data.decode import IMAGE_SUFFIXES
from localfeat.data.labelled import Batch, FileImages, batch_loader
from localfeat.errors import UserError


def list_images(folder: str | Path) -> list[Path]:
    """All image files below ``folder``, sorted by path; hidden files and folders are skipped.

    Raises:
        UserError: if there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give a folder with images")
    paths = image_paths(folder)
    if not paths:
        raise UserError(f"no image in {folder} or below it; looked for {' '.join(sorted(IMAGE_SUFFIXES))}")
    return paths


def image_paths(folder: Path) -> list[Path]:
    """The image files below ``folder``, sorted; hidden ones skipped; possibly empty."""
    found = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(path for path in found if not _is_hidden(path.relative_to(folder)) and path.is_file())


def image_files_loader(paths: Sequence[Path], image_size: int, batch_size: int, num_workers: int) -> DataLoader[Batch]:
    """Batches of image files of any size, in the order of ``paths``.

    Yields uint8 images (B, 3, image_size, image_size), their shorter side resized and the centre kept, and
    the positions (B,) int64 in ``paths``. ``num_workers`` processes decode (0: the calling process).
    """
    if batch_size < 1 or image_size < 1:
        raise UserError(f"batch_size={batch_size}, image_size={image_size}: both must be at least 1")
    return batch_loader(FileImages(paths, torch.arange(len(paths)), image_size), num_workers, batch_size=batch_size)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)

"""Any dataset kept as files: ``train/<class>/...``, ``test/<class>/...`` and optionally ``val/<class>/...``."""

import os
from pathlib import Path

import torch

from localfeat.data.decode import common_size, read_images
from localfeat.data.files import image_paths
from localfeat.data.labelled import FileImages, LabelledImages, TensorImages
from localfeat.errors import UserError

MEMORY_LIMIT = 4 * 1024**3  # bytes of decoded pixels kept in memory, at most half of the machine's
LAYOUT = "train/<class>/<image> and test/<class>/<image> (val/<class>/<image> is optional)"


class ImageFolder:
    """Labelled images in folders; the class names are the folder names, sorted.

    Images that all share one size keep it, provided that they are held in memory. Otherwise the shorter side of
    each is resized (bicubic, antialiased) to the *store size*, 8/7 of ``image_size`` (256 for 224), and the centre
    square is kept. They are decoded once into one tensor if that needs no more than ``MEMORY_LIMIT`` or half of
    the machine's memory, else by the loader's workers for each batch.

    Args:
        root: the folder with the splits.
        image_size: side in pixels that the network will see.
        in_memory: overrides the decision by size.

    Raises:
        UserError: without train and test folders, for an empty class folder, or if splits differ in their classes.
    """

    def __init__(self, root: Path, image_size: int, in_memory: bool | None = None) -> None:
        self.root = root
        self.store_size = round(image_size * 8 / 7)
        self._wanted_in_memory = in_memory
        self._files = {split: _scan(root / split) for split in ("train", "val", "test") if (root / split).is_dir()}
        if "train" not in self._files or "test" not in self._files:
            raise UserError(f"image_folder: {root.absolute()} has no {_absent(self._files)} folder; expected {LAYOUT}")
        _check_same_classes(root, self._files)
        self._names = list(self._files["train"])
        self.num_classes = len(self._names)
        self._native: tuple[int, int] | None = None
        self._decided = False
        self._in_memory = False

    @property
    def in_memory(self) -> bool:
        """Whether the images are decoded once; reads every file's header at the first call."""
        self._decide()
        return self._in_memory

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images as they are loaded; reads every file's header at the first call."""
        self._decide()
        return self._native if self._in_memory and self._native else (self.store_size, self.store_size)

    def prepare(self, download: bool) -> None:
        """Nothing to fetch: the files were found at construction."""

    def size(self, split: str) -> int | None:
        return sum(len(paths) for paths in self._files[split].values()) if split in self._files else None

    def has_validation(self) -> bool:
        return "val" in self._files

    def class_names(self) -> list[str]:
        return self._names

    def load(self, split: str) -> LabelledImages:
        classes = self._files[split].values()
        paths = [path for members in classes for path in members]
        labels = torch.cat([torch.full((len(members),), label) for label, members in enumerate(classes)])
        if not self.in_memory:
            return FileImages(paths, labels, self.store_size)
        height, width = self._native or (self.store_size, self.store_size)
        return TensorImages(read_images(paths, height, width, resize=self._native is None), labels)

    def _decide(self) -> None:
        """Choose once, over all splits together, between memory and files, and the stored size."""
        if self._decided:
            return
        paths = [path for classes in self._files.values() for members in classes.values() for path in members]
        self._native = None if self._wanted_in_memory is False else common_size(paths)
        if self._native and not self._wanted_in_memory and not _fits(len(paths), *self._native):
            self._native = None
        fits = _fits(len(paths), *(self._native or (self.store_size, self.store_size)))
        self._in_memory = fits if self._wanted_in_memory is None else self._wanted_in_memory
        self._decided = True


def _scan(split: Path) -> dict[str, list[Path]]:
    """Class name -> sorted image files of one split, classes sorted by name."""
    folders = sorted(path for path in split.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"image_folder: {split.absolute()} has no class folders; expected {LAYOUT}")
    files = {folder.name: image_paths(folder) for folder in folders}
    for name, paths in files.items():
        if not paths:
            raise UserError(f"image_folder: the class folder {split.absolute() / name} has no image; fill or delete it")
    return files


def _absent(files: dict[str, dict[str, list[Path]]]) -> str:
    return " and no ".join(split for split in ("train", "test") if split not in files)


def _check_same_classes(root: Path, files: dict[str, dict[str, list[Path]]]) -> None:
    train = set(files["train"])
    for split in files:
        if different := sorted(train.symmetric_difference(files[split])):
            shown = ", ".join(different[:5]) + (", ..." if len(different) > 5 else "")
            raise UserError(f"image_folder: train and {split} in {root.absolute()} differ in their classes: {shown}")


def _fits(count: int, height: int, width: int) -> bool:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return count * height * width * 3 <= min(MEMORY_LIMIT, machine // 2)

"""A dataset of image files: ``train/<class>/...``, ``test/<class>/...`` and optionally ``val/<class>/...``."""

import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from localfeat.data.arrays import holds_array
from localfeat.data.bad_files import BadFiles, BadImage
from localfeat.data.decode import IMAGE_SUFFIXES, common_size, read_image, read_images
from localfeat.data.files import holds, image_paths, made_by_a_system, tell_others
from localfeat.data.labelled import FileImages, LabelledImages, TensorImages, no_sound_image
from localfeat.data.pixels import RGB, Pixels
from localfeat.utils.errors import UserError
from localfeat.utils.files import not_a
from localfeat.utils.sizes import sides
from localfeat.utils.text import prints, shown

MEMORY_LIMIT = 4 * 1024**3  # bytes of decoded pixels held in memory; never more than half of the machine's
_SPLITS = ("train", "val", "test")
LAYOUT = "train/<class>/<image> and test/<class>/<image> (val/<class>/<image> is optional)"


class ImageFolder:
    """Labelled images in folders; the class names are the folder names, sorted.

    Images are decoded once into one tensor if that fits into ``MEMORY_LIMIT`` and half of the machine's memory, else
    by the loader's workers for each batch. Images in memory that all share one size keep it. Otherwise the centre
    part of each with the aspect of ``image_size`` is resized (bicubic, antialiased) to the *store size*, 8/7 of it
    (256 for 224).

    `image_paths` says which files are images. How many others there are, and how many images lie in no class folder,
    is told on stderr. Class names are compared and shown in Unicode's composed form (NFC).

    With ``skip_bad``, files that cannot be decoded are left out, each reported once on stderr: from the tensor, or
    from the batches they belong to, see `FileImages`. Both depend only on the files.

    Args:
        root: the folder with the splits.
        image_size: side in pixels of the network's input, or height and width.
        in_memory: whether to hold the images in memory; None decides by size.
        skip_bad: whether to leave bad files out instead of ending with an error.
        pixels: what the files' pixels become.

    Raises:
        UserError: missing train or test folders, an empty class folder, a single class, splits with different
            classes, a class whose name does not print; in `load`, a class whose files are all bad.
    """

    def __init__(
        self,
        root: Path,
        image_size: int | Sequence[int],
        in_memory: bool | None = None,
        skip_bad: bool = False,
        pixels: Pixels = RGB,
    ) -> None:
        self.root, self.pixels = root, pixels
        height, width = sides(image_size)
        self.store_size = round(height * 8 / 7), round(width * 8 / 7)
        self._wanted_in_memory = in_memory
        present = [split for split in _SPLITS if os.path.isdir(root / split)]
        self._bad = {split: BadFiles() if skip_bad else None for split in present}
        others = Counter[str]()
        self._files = {split: _scan(root / split, self._bad[split], others) for split in present}
        if absent := [split for split in ("train", "test") if split not in present]:
            raise UserError(_missing(root, absent))
        tell_others(root, others)
        _tell_loose_images(root, present)
        _check_classes(root, self._files)
        self._names = list(self._files["train"])
        self.num_classes = len(self._names)
        self._native: tuple[int, int] | None = None
        self._decided = False
        self._in_memory = False

    @property
    def in_memory(self) -> bool:
        """Whether the images are decoded once; the first access reads every file's header."""
        self._decide()
        return self._in_memory

    @property
    def example(self) -> Tensor:
        """One image as it is loaded (C, h, w), without data; the first access reads every file's header."""
        self._decide()
        return self._image(self._native if self._in_memory and self._native else self.store_size)

    def _image(self, size: tuple[int, int]) -> Tensor:
        return torch.empty(self.pixels.channels, *size, dtype=self.pixels.dtype, device="meta")

    def prepare(self, download: bool) -> None:
        """Do nothing: the files were found at construction."""

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
        bad = self._bad[split]
        if split == "train":
            _tell_range(paths[0], self.pixels)
        if not self.in_memory:
            return FileImages(paths, labels, self.store_size, bad, self.pixels)
        size = self._native or self.store_size
        images, kept = read_images(paths, size, self.pixels, resized=self._native is None, bad=bad)
        for members, count in zip(classes, torch.bincount(labels[kept], minlength=len(classes)), strict=True):
            if count == 0:
                raise UserError(no_sound_image(members[0], len(members)))
        return TensorImages(images, labels[kept])

    def _decide(self) -> None:
        """Choose the stored size, and memory or files, once for all splits together."""
        if self._decided:
            return
        paths = [path for classes in self._files.values() for members in classes.values() for path in members]
        skips = self._bad["train"] is not None
        self._native = None if self._wanted_in_memory is False else common_size(paths, skips, self.pixels)
        if self._native and not self._wanted_in_memory and not _fits(len(paths) * self._image(self._native).nbytes):
            self._native = None
        fits = _fits(len(paths) * self._image(self._native or self.store_size).nbytes)
        self._in_memory = fits if self._wanted_in_memory is None else self._wanted_in_memory
        self._decided = True


def _missing(root: Path, absent: Sequence[str]) -> str:
    """Return the message for a folder without these splits; it names the folders that are there instead."""
    if not os.path.isdir(root):
        return f"image_folder: {shown(root.absolute())}: {not_a('folder', root)}"
    with _readable(root):
        others = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name not in _SPLITS)
    only = f"; it has {', '.join(map(shown, others[:5]))}{', …' if len(others) > 5 else ''}" if others else ""
    return f"image_folder: {shown(root.absolute())} has no {' and no '.join(absent)} folder{only}; expected {LAYOUT}"


def _scan(split: Path, bad: BadFiles | None, others: Counter[str]) -> dict[str, list[Path]]:
    """Map each class name of one split, in sorted order, to its sorted image files; count all others."""
    with _readable(split):
        entries = sorted(path for path in split.iterdir() if not made_by_a_system(path.name))
    folders = [path for path in entries if path.is_dir()]
    if dead := [path for path in entries if path.is_symlink() and not path.exists()]:
        raise UserError(f"image_folder: {shown(dead[0].absolute())} is a link that leads nowhere; mend or delete it")
    if not folders:
        raise UserError(f"image_folder: {shown(split.absolute())} has no class folders; expected {LAYOUT}")
    files: dict[str, list[Path]] = {}
    for folder in folders:
        name, where = unicodedata.normalize("NFC", folder.name), shown(folder.absolute())
        if not prints(name):  # the name will appear in tables, files and terminals
            raise UserError(f"image_folder: the class {where} has a name that does not print; rename it")
        if name in files:
            raise UserError(f"image_folder: two class folders are called {where}, in two Unicode forms; merge them")
        beside = Counter[str]()
        files[name] = image_paths(folder, bad, beside)
        if not files[name]:
            raise UserError(f"image_folder: the class folder {where} has no image{holds(beside)}; fill or delete it")
        others += beside
    return dict(sorted(files.items()))


def _tell_loose_images(root: Path, splits: Sequence[str]) -> None:
    """Tell on stderr of images that lie beside the class folders."""
    found: list[Path] = []
    for split in splits:
        with _readable(root / split):
            beside = (path for path in (root / split).iterdir() if not path.name.startswith("."))
            found += sorted(path for path in beside if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if found:
        count, example = len(found), shown(found[0])
        what = "image lies in no class folder and is" if count == 1 else "images lie in no class folder and are"
        print(f"warning: {count} {what} left out, such as {example}", file=sys.stderr, flush=True)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = shown(error.filename or folder)
        raise UserError(f"image_folder: {where} cannot be read ({error.strerror})") from error


def _check_classes(root: Path, files: dict[str, dict[str, list[Path]]]) -> None:
    train, where = set(files["train"]), shown(root.absolute())
    for split in files:
        other = set(files[split])
        if train == other:
            continue
        apart = {"train": sorted(train - other), split: sorted(other - train)}
        only = (f"only in {s}: {', '.join(n[:5])}{', …' if len(n) > 5 else ''}" for s, n in apart.items() if n)
        raise UserError(f"image_folder: train and {split} in {where} differ in their classes ({'; '.join(only)})")
    if len(train) < 2:
        raise UserError(f"image_folder: {where} has one class, {next(iter(train))}; a classifier needs two or more")


def _tell_range(path: Path, pixels: Pixels) -> None:
    """Tell on stderr if an array's values are hardly within the range that they are read by."""
    if not holds_array(path, pixels):
        return
    try:
        image = read_image(path, pixels=pixels)
    except BadImage:  # told when all files are read
        return
    if pixels.value_range is not None and ((image <= 0) | (image >= 255)).mean() > 0.5:
        low, high = pixels.value_range
        what = f"most values of {shown(path)} lie outside dataset.value_range=[{low:g},{high:g}]"
    elif image.max() < 32:
        what = (
            f"the values of {shown(path)} end at {image.max() / 255:.0%} of white: set dataset.value_range=[low,high]"
        )
    else:
        return
    print(f"warning: {what}", file=sys.stderr, flush=True)


def _fits(size: int) -> bool:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return size <= min(MEMORY_LIMIT, machine // 2)

"""CIFAR-10/100, STL-10 and SVHN by torchvision's dataset classes.

torchvision is imported only when a source is used; its classes then give the file names and checksums.
"""

import hashlib
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localfeat.data import download
from localfeat.data.labelled import TensorImages
from localfeat.data.sources import check_labels
from localfeat.utils.errors import UserError
from localfeat.utils.text import shown

_PICKLED_ARRAYS = {  # the only objects in CIFAR's pickles
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}

Arrays = tuple[np.ndarray, np.ndarray, list[str]]  # images (N, 3, h, w) uint8, labels (N,), class names


@dataclass(frozen=True)
class Files:
    """The files that a dataset needs on disk (path relative to its root -> md5), and where they come from.

    ``archives`` are (url, file name, md5); the wanted files of a .tar.gz are unpacked into the root. A file whose md5
    is None, because none is published, holds the class names, one per line.
    """

    wanted: dict[str, str | None]
    archives: list[tuple[str, str, str]]


@dataclass
class TorchvisionSource:
    """One of torchvision's datasets as uint8 tensors.

    Args:
        name: name used in messages.
        root: folder that holds (or will hold) the files.
        num_classes: number of classes, checked against the labels and class names in the files.
        side: side of the images in pixels.
        files: function that returns the needed files.
        read: function that reads the arrays of split "train" or "test" from a root.
    """

    name: str
    root: Path
    num_classes: int
    side: int
    files: Callable[[], Files]
    read: Callable[[Path, str], Arrays]
    in_memory: bool = True
    _names: list[str] | None = field(default=None, repr=False)

    @property
    def example(self) -> Tensor:
        return torch.empty(3, self.side, self.side, dtype=torch.uint8, device="meta")

    def prepare(self, download: bool) -> None:
        """Download missing or damaged files if ``download``; raise ``UserError`` if files stay missing.

        Several processes may call it at the same time: one downloads, the others wait for it.
        """
        missing = self._missing()
        if missing and download:
            missing = self._download(missing)
        if missing:
            raise UserError(f"{self._complaint(missing)}; {self._remedy()}, or set download=true")

    def size(self, split: str) -> int | None:
        return None

    def has_validation(self) -> bool:
        return False

    def load(self, split: str) -> TensorImages:
        try:
            images, labels, names = self.read(self.root, split)
        except ImportError:
            raise
        except Exception as error:  # readers raise nearly anything for a file damaged after it was verified
            raise UserError(
                f"cannot read {self.name} in {shown(self.root)}: {_one_line(error)}; {self._remedy()}"
            ) from error
        where = f"{self.name} ({split}) in {shown(self.root)}"
        if len(names) != self.num_classes:
            raise UserError(f"{where} names {len(names)} classes; {self.num_classes} are expected")
        if len(images) != len(labels):
            raise UserError(f"{where} holds {len(images)} images and {len(labels)} labels; {self._remedy()}")
        targets = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
        check_labels(where, targets, self.num_classes, every_class=split == "train")
        self._names = names
        return TensorImages(_tensor(images), targets)

    def class_names(self) -> list[str]:
        """Return the names from the files; load the test images if nothing was loaded yet."""
        if self._names is None:
            self.load("test")
        assert self._names is not None
        return self._names

    def _missing(self) -> list[str]:
        return [path for path, md5 in self.files().wanted.items() if not self._is_sound(self.root / path, md5)]

    def _is_sound(self, file: Path, md5: str | None) -> bool:
        from torchvision.datasets.utils import check_integrity

        try:
            if md5 is None:
                return file.is_file() and len(file.read_bytes().splitlines()) == self.num_classes
            return check_integrity(file, md5)
        except OSError:  # it exists but cannot be read
            return False

    def _download(self, missing: list[str]) -> list[str]:
        """Fetch and unpack; return the files that are still missing."""
        files, url = self.files(), ""
        try:
            with download.sole_writer(self.root, [*(name for _, name, _ in files.archives), *files.wanted]):
                missing = self._missing()  # another process may have fetched them meanwhile
                for url, name, md5 in files.archives:
                    wanted = {path: files.wanted[path] for path in missing}
                    if name.endswith(".tar.gz") and wanted:
                        download.fetch(url, self.root / name, md5)
                        download.unpack(self.root / name, md5, self.root, wanted)
                    elif name in wanted:
                        download.fetch(url, self.root / name, md5)
                return self._missing()
        except download.ERRORS as error:
            reason = f"downloading {url or files.archives[0][0]} failed ({_one_line(error)})"
            raise UserError(f"{self._complaint(missing)}, and {reason}; {self._remedy()}") from error

    def _complaint(self, missing: list[str]) -> str:
        return f"{self.name}: missing or damaged in {shown(self.root.absolute())}: {', '.join(missing)}"

    def _remedy(self) -> str:
        sources = ", ".join(url for url, _, _ in self.files().archives)
        return f"fetch {sources} and unpack archives there"


def cifar10(root: Path) -> TorchvisionSource:
    """Return CIFAR-10: 50,000 + 10,000 images of 32 px in 10 classes."""
    return TorchvisionSource("cifar10", root, 10, 32, lambda: _cifar_files("CIFAR10"), _cifar_reader("CIFAR10"))


def cifar100(root: Path) -> TorchvisionSource:
    """Return CIFAR-100 with its fine labels: 50,000 + 10,000 images of 32 px in 100 classes."""
    return TorchvisionSource("cifar100", root, 100, 32, lambda: _cifar_files("CIFAR100"), _cifar_reader("CIFAR100"))


def stl10(root: Path) -> TorchvisionSource:
    """Return the labelled part of STL-10: 5,000 + 8,000 images of 96 px in 10 classes, without the unlabelled file."""
    return TorchvisionSource("stl10", root, 10, 96, _stl10_files, _read_stl10)


def svhn(root: Path) -> TorchvisionSource:
    """Return SVHN's cropped digits: 73,257 + 26,032 images of 32 px in 10 classes, without the "extra" part."""
    return TorchvisionSource("svhn", root, 10, 32, _svhn_files, _read_svhn)


def _cifar_files(class_name: str) -> Files:
    from torchvision import datasets

    cls = getattr(datasets, class_name)
    listed = [*cls.train_list, *cls.test_list, [cls.meta["filename"], cls.meta["md5"]]]
    wanted = {f"{cls.base_folder}/{name}": md5 for name, md5 in listed}
    return Files(wanted, [(cls.url, cls.filename, cls.tgz_md5)])


def _cifar_reader(class_name: str) -> Callable[[Path, str], Arrays]:
    """Return a reader that unpickles the very bytes it verified; torchvision's classes open the files again."""

    def read(root: Path, split: str) -> Arrays:
        from torchvision import datasets

        cls = getattr(datasets, class_name)
        folder = root / cls.base_folder
        parts = [
            _unpickled(folder / name, md5) for name, md5 in (cls.train_list if split == "train" else cls.test_list)
        ]
        images = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
        labels = [label for part in parts for label in part["labels" if "labels" in part else "fine_labels"]]
        names = _unpickled(folder / cls.meta["filename"], cls.meta["md5"])[cls.meta["key"]]
        return images, np.asarray(labels), names

    return read


def _unpickled(file: Path, md5: str) -> dict[str, Any]:
    """Unpickle a CIFAR file after verifying its checksum.

    Raises:
        RuntimeError: the checksum is wrong.
    """
    content = file.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise RuntimeError(f"{file.name} is damaged: it has the wrong checksum")
    return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()


class _ArraysOnly(pickle.Unpickler):
    """Unpickler that refuses code, even in files with the right checksum."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED_ARRAYS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not an array")
        return super().find_class(module, name)


def _labelled_stl10() -> Any:
    from torchvision.datasets import STL10

    class LabelledSTL10(STL10):
        """STL10 whose integrity check does not require the 2.8 GB of unlabelled images."""

        train_list = STL10.train_list[:2]

    return LabelledSTL10


def _stl10_files() -> Files:
    cls = _labelled_stl10()
    wanted: dict[str, str | None] = {
        f"{cls.base_folder}/{name}": md5 for name, md5 in [*cls.train_list, *cls.test_list]
    }
    wanted[f"{cls.base_folder}/{cls.class_names_file}"] = None
    return Files(wanted, [(cls.url, cls.filename, cls.tgz_md5)])


def _read_stl10(root: Path, split: str) -> Arrays:
    data = _labelled_stl10()(str(root), split=split)
    return data.data, data.labels.astype(np.int64), data.classes


def _svhn_files() -> Files:
    from torchvision.datasets import SVHN

    archives = [tuple(SVHN.split_list[split]) for split in ("train", "test")]
    return Files({filename: md5 for _, filename, md5 in archives}, archives)


def _read_svhn(root: Path, split: str) -> Arrays:
    from torchvision.datasets import SVHN

    data = SVHN(str(root), split=split)
    return data.data, data.labels, [str(digit) for digit in range(10)]


def _tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images))


def _one_line(error: BaseException) -> str:
    return shown(" ".join(str(error).split())) or type(error).__name__

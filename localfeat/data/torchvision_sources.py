"""CIFAR-10/100, STL-10 and SVHN, read and downloaded by torchvision's own dataset classes.

torchvision is imported when a source is used. File names and checksums are taken from its classes at that moment.
"""

import http.client
import socket
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localfeat.data.labelled import TensorImages
from localfeat.data.sources import check_labels
from localfeat.errors import UserError

_NETWORK_TIMEOUT = 30.0  # seconds without a byte; torchvision itself would wait for ever
_DOWNLOAD_ERRORS = (OSError, EOFError, RuntimeError, tarfile.TarError, http.client.HTTPException)

Arrays = tuple[np.ndarray, np.ndarray, list[str]]  # images (N, 3, h, w) uint8, labels (N,), class names


@dataclass(frozen=True)
class Files:
    """What a dataset needs on disk: paths relative to its root with md5, and where they come from.

    ``archives`` are (url, file name, md5); those ending in .tar.gz are unpacked into the root.
    """

    wanted: list[tuple[str, str | None]]
    archives: list[tuple[str, str, str]]


@dataclass
class TorchvisionSource:
    """One of torchvision's datasets as uint8 tensors.

    Args:
        name: for messages.
        root: folder that holds (or will hold) the files.
        num_classes: checked against the labels and class names that the files hold.
        image_shape: height and width of the images.
        files: gives the needed files.
        read: gives the arrays of split "train" or "test" from a root.
    """

    name: str
    root: Path
    num_classes: int
    image_shape: tuple[int, int]
    files: Callable[[], Files]
    read: Callable[[Path, str], Arrays]
    in_memory: bool = True
    _names: list[str] | None = field(default=None, repr=False)

    def prepare(self, download: bool) -> None:
        """Download what is missing or damaged, if ``download``; ``UserError`` if files stay missing."""
        missing = self._missing()
        if missing and download:
            self._download(missing)
            missing = self._missing()
        if missing:
            raise UserError(f"{self._complaint(missing)}; {self._remedy()}, or set download=true")

    def size(self, split: str) -> int | None:
        return None

    def has_validation(self) -> bool:
        return False

    def load(self, split: str) -> TensorImages:
        try:
            images, labels, names = self.read(self.root, split)
        except _DOWNLOAD_ERRORS as error:
            raise UserError(f"cannot read {self.name} in {self.root}: {_one_line(error)}; {self._remedy()}") from error
        if len(names) != self.num_classes:
            raise UserError(f"{self.name} in {self.root} names {len(names)} classes; {self.num_classes} are expected")
        targets = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
        check_labels(f"{self.name} ({split}) in {self.root}", targets, self.num_classes, every_class=split == "train")
        self._names = names
        return TensorImages(_tensor(images), targets)

    def class_names(self) -> list[str]:
        """Names from the files (loads the test images if nothing was loaded yet)."""
        if self._names is None:
            self.load("test")
        assert self._names is not None
        return self._names

    def _missing(self) -> list[str]:
        from torchvision.datasets.utils import check_integrity

        return [path for path, md5 in self.files().wanted if not check_integrity(self.root / path, md5)]

    def _download(self, missing: list[str]) -> None:
        from torchvision.datasets.utils import check_integrity, download_and_extract_archive, download_url

        existed = self.root.exists()
        for url, filename, md5 in self.files().archives:
            unpack = filename.endswith(".tar.gz")
            if not unpack and filename not in missing:
                continue
            fetch = download_and_extract_archive if unpack else download_url
            try:
                with _timeout(_NETWORK_TIMEOUT):
                    fetch(url, str(self.root), filename=filename, md5=md5)
            except _DOWNLOAD_ERRORS as error:
                if not check_integrity(self.root / filename, md5):
                    with suppress(OSError):  # root may be no folder
                        (self.root / filename).unlink(missing_ok=True)  # a half file is of no use to the next run
                if not existed:
                    with suppress(OSError):  # not empty
                        self.root.rmdir()
                reason = f"downloading {url} failed ({_one_line(error)})"
                raise UserError(f"{self._complaint(missing)}, and {reason}; {self._remedy()}") from error

    def _complaint(self, missing: list[str]) -> str:
        return f"{self.name}: missing or damaged in {self.root.absolute()}: {', '.join(missing)}"

    def _remedy(self) -> str:
        sources = ", ".join(url for url, _, _ in self.files().archives)
        return f"fetch {sources} and unpack archives there"


def cifar10(root: Path) -> TorchvisionSource:
    """CIFAR-10: 50,000 + 10,000 images of 32 px in 10 classes."""
    return TorchvisionSource("cifar10", root, 10, (32, 32), lambda: _cifar_files("CIFAR10"), _cifar_reader("CIFAR10"))


def cifar100(root: Path) -> TorchvisionSource:
    """CIFAR-100 with its fine labels: 50,000 + 10,000 images of 32 px in 100 classes."""
    return TorchvisionSource(
        "cifar100", root, 100, (32, 32), lambda: _cifar_files("CIFAR100"), _cifar_reader("CIFAR100")
    )


def stl10(root: Path) -> TorchvisionSource:
    """STL-10, labelled part: 5,000 + 8,000 images of 96 px in 10 classes; the unlabelled file is not needed."""
    return TorchvisionSource("stl10", root, 10, (96, 96), _stl10_files, _read_stl10)


def svhn(root: Path) -> TorchvisionSource:
    """SVHN cropped digits: 73,257 + 26,032 images of 32 px in 10 classes, without the "extra" part."""
    return TorchvisionSource("svhn", root, 10, (32, 32), _svhn_files, _read_svhn)


def _cifar_files(class_name: str) -> Files:
    from torchvision import datasets

    cls = getattr(datasets, class_name)
    listed = [*cls.train_list, *cls.test_list, [cls.meta["filename"], cls.meta["md5"]]]
    wanted = [(f"{cls.base_folder}/{name}", md5) for name, md5 in listed]
    return Files(wanted, [(cls.url, cls.filename, cls.tgz_md5)])


def _cifar_reader(class_name: str) -> Callable[[Path, str], Arrays]:
    def read(root: Path, split: str) -> Arrays:
        from torchvision import datasets

        data = getattr(datasets, class_name)(str(root), train=split == "train")
        return data.data.transpose(0, 3, 1, 2), data.targets, data.classes

    return read


def _labelled_stl10() -> Any:
    from torchvision.datasets import STL10

    class LabelledSTL10(STL10):
        """STL10 whose integrity check does not ask for the 2.8 GB of unlabelled images."""

        train_list = STL10.train_list[:2]

    return LabelledSTL10


def _stl10_files() -> Files:
    cls = _labelled_stl10()
    wanted = [(f"{cls.base_folder}/{name}", md5) for name, md5 in [*cls.train_list, *cls.test_list]]
    # Published without a checksum; it only has to exist.
    return Files([*wanted, (f"{cls.base_folder}/{cls.class_names_file}", None)], [(cls.url, cls.filename, cls.tgz_md5)])


def _read_stl10(root: Path, split: str) -> Arrays:
    data = _labelled_stl10()(str(root), split=split)
    return data.data, data.labels.astype(np.int64), data.classes


def _svhn_files() -> Files:
    from torchvision.datasets import SVHN

    archives = [tuple(SVHN.split_list[split]) for split in ("train", "test")]
    return Files([(filename, md5) for _, filename, md5 in archives], archives)


def _read_svhn(root: Path, split: str) -> Arrays:
    from torchvision.datasets import SVHN

    data = SVHN(str(root), split=split)
    return data.data, data.labels, [str(digit) for digit in range(10)]


def _tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

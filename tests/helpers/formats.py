"""Write small datasets in the on-disk formats of CIFAR-10/100, STL-10 and SVHN, and image folders.

Each writer returns, per split, the images (N, 3, h, w) uint8 and labels (N,) int64 that a correct reader must return.
The `accept` functions replace nothing but the checksum tables of torchvision's classes.
"""

import hashlib
import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

Split = tuple[np.ndarray, np.ndarray]
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def random_split(count: int, classes: int, size: int, seed: int) -> Split:
    """Return random pixels, and labels that cycle through the classes."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return images, np.arange(count) % classes


def write_cifar10(root: Path, per_batch: int = 20) -> dict[str, Split]:
    """Write cifar-10-python.tar.gz's folder: five data batches, test_batch and batches.meta, pickled as by Python 2."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    parts = [random_split(per_batch, 10, 32, seed) for seed in range(5)]
    for number, (images, labels) in enumerate(parts, start=1):
        name = f"training batch {number} of 5"
        _pickle(folder / f"data_batch_{number}", _cifar_batch(images, name) | {b"labels": labels.tolist()})
    test = random_split(per_batch, 10, 32, 99)
    _pickle(folder / "test_batch", _cifar_batch(test[0], "testing batch 1 of 1") | {b"labels": test[1].tolist()})
    names = [name.encode() for name in CIFAR10_NAMES]
    meta = {b"num_cases_per_batch": per_batch, b"label_names": names, b"num_vis": 3072}
    _pickle(folder / "batches.meta", meta)
    train = np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
    return {"train": train, "test": test}


def write_cifar100(root: Path, train: int = 300, test: int = 100) -> dict[str, Split]:
    """Write the folder of cifar-100-python.tar.gz: train, test and meta with fine and coarse labels."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    splits = {"train": random_split(train, 100, 32, 0), "test": random_split(test, 100, 32, 1)}
    for name, (images, labels) in splits.items():
        fine_and_coarse = {b"fine_labels": labels.tolist(), b"coarse_labels": (labels // 5).tolist()}
        _pickle(folder / name, _cifar_batch(images, name) | fine_and_coarse)
    fine, coarse = [b"fine_%02d" % i for i in range(100)], [b"coarse_%02d" % i for i in range(20)]
    _pickle(folder / "meta", {b"fine_label_names": fine, b"coarse_label_names": coarse})
    return splits


def write_array_folder(root: Path, channels: int, size: tuple[int, int], per_class: int = 8) -> None:
    """Write train/ and test/ with a dark and a bright class of uint16 arrays (channels, *size) in .npy files."""
    for split in ("train", "test"):
        for label in range(2):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            generator = np.random.default_rng(label)
            for number in range(per_class):
                values = generator.integers(0, 5000, (channels, *size)) + 4999 * label
                np.save(folder / f"{number}.npy", values.astype(np.uint16))


def write_stl10(root: Path, train: int = 30, test: int = 20) -> dict[str, Split]:
    """Write the folder of stl10_binary.tar.gz without unlabeled_X.bin; pixels column by column, labels from 1."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    splits = {"train": random_split(train, 10, 96, 0), "test": random_split(test, 10, 96, 1)}
    for name, (images, labels) in splits.items():
        images.transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")
        (labels + 1).astype(np.uint8).tofile(folder / f"{name}_y.bin")
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    folds = [" ".join(str(i) for i in range(fold, train, 10)) for fold in range(10)]
    (folder / "fold_indices.txt").write_text("\n".join(folds) + "\n")
    return splits


def write_svhn(root: Path, train: int = 30, test: int = 20) -> dict[str, Split]:
    """Write train_32x32.mat and test_32x32.mat: X (32, 32, 3, N), y (N, 1), where 10 means the digit 0."""
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    splits = {"train": random_split(train, 10, 32, 0), "test": random_split(test, 10, 32, 1)}
    for name, (images, labels) in splits.items():
        digits = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        savemat(root / f"{name}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": digits}, do_compression=True)
    return splits


def write_image_folder(
    root: Path, splits: dict[str, int], classes: int = 3, size: tuple[int, int] = (12, 12)
) -> dict[str, Split]:
    """Write ``root/<split>/<class>/<n>.png``, ``splits[split]`` images per class; return pixels in path order."""
    written = {}
    for seed, (split, per_class) in enumerate(splits.items()):
        generator = np.random.default_rng(seed)
        images = generator.integers(0, 256, (classes * per_class, *size, 3), dtype=np.uint8)
        labels = np.repeat(np.arange(classes), per_class)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / split / f"class_{label}" / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        written[split] = images.transpose(0, 3, 1, 2), labels
    return written


def accept_cifar(monkeypatch: pytest.MonkeyPatch, root: Path, hundred: bool = False) -> None:
    """Make torchvision's CIFAR10 (or CIFAR100) accept the files written below ``root``."""
    from torchvision.datasets import CIFAR10, CIFAR100

    cls = CIFAR100 if hundred else CIFAR10
    folder = root / cls.base_folder
    for table in ("train_list", "test_list"):
        monkeypatch.setattr(cls, table, [[name, md5(folder / name)] for name, _ in getattr(cls, table)])
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5(folder / cls.meta["filename"])})


def accept_stl10(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Make torchvision's STL10 accept the labelled files written below ``root``."""
    from torchvision.datasets import STL10

    folder = root / STL10.base_folder
    labelled = [[name, md5(folder / name)] for name, _ in STL10.train_list[:2]]
    monkeypatch.setattr(STL10, "train_list", [*labelled, STL10.train_list[2]])
    monkeypatch.setattr(STL10, "test_list", [[name, md5(folder / name)] for name, _ in STL10.test_list])


def accept_svhn(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Make torchvision's SVHN accept the files written below ``root``."""
    from torchvision.datasets import SVHN

    table = dict(SVHN.split_list)
    for split in ("train", "test"):
        url, name, _ = table[split]
        table[split] = [url, name, md5(root / name)]
    monkeypatch.setattr(SVHN, "split_list", table)


def write_source(monkeypatch: pytest.MonkeyPatch, name: str, root: Path) -> dict[str, Split]:
    """Write a small "cifar10", "cifar100", "stl10" or "svhn" below ``root`` and make torchvision accept it."""
    writers = {"cifar10": write_cifar10, "cifar100": write_cifar100, "stl10": write_stl10, "svhn": write_svhn}
    written = writers[name](root)
    if name.startswith("cifar"):
        accept_cifar(monkeypatch, root, hundred=name == "cifar100")
    else:
        {"stl10": accept_stl10, "svhn": accept_svhn}[name](monkeypatch, root)
    return written


def archive(folder: Path) -> bytes:
    """Return ``folder`` as the bytes of a .tar.gz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return buffer.getvalue()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def _cifar_batch(images: np.ndarray, name: str) -> dict[bytes, Any]:
    filenames = [b"image_%05d.png" % i for i in range(len(images))]
    return {b"batch_label": name.encode(), b"data": images.reshape(len(images), -1), b"filenames": filenames}


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]  # the one in C cannot be extended
    """Pickles bytes as Python 2's ``str``, as in the published files, so that readers must give an encoding."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def _pickle(path: Path, content: dict[bytes, Any]) -> None:
    with path.open("wb") as file:
        _Python2Pickler(file, protocol=2).dump(content)

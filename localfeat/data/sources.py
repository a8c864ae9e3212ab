"""Sources: each gives the two or three labelled splits of one dataset."""

from typing import Protocol

import torch
from torch import Tensor

from localfeat.data.labelled import LabelledImages, TensorImages
from localfeat.data.sampling import stratified_split
from localfeat.utils.errors import UserError

SPLITS = ("train", "val", "test")


class Source(Protocol):
    """One dataset. ``load`` of one split must not touch the labels of another."""

    num_classes: int

    @property
    def in_memory(self) -> bool:
        """Whether `load` returns images held in one tensor; image_folder reads its files' headers to decide."""

    @property
    def example(self) -> Tensor:
        """One image as it is loaded (C, h, w), without data; image_folder reads its files' headers for it."""

    def prepare(self, download: bool) -> None:
        """Make sure that all files exist and are sound; raise ``UserError`` otherwise."""

    def size(self, split: str) -> int | None:
        """Return the number of images if it is known before loading, else None."""

    def has_validation(self) -> bool:
        """Return whether the source has its own validation split."""

    def load(self, split: str) -> LabelledImages:
        """Load the images of "train", "test" or, if it exists, "val"."""

    def class_names(self) -> list[str]:
        """Return one name per class, in the order of the labels."""


class Digits:
    """scikit-learn's embedded digits: 1,797 grey 8 x 8 images in 10 classes, no file or network needed.

    Grey values 0..16 become RGB 0..255. The split into 80 % train and 20 % test is stratified and fixed, whatever the
    run's seed.
    """

    num_classes = 10
    in_memory = True
    example = torch.empty(3, 8, 8, dtype=torch.uint8, device="meta")

    def prepare(self, download: bool) -> None:
        """Do nothing: the images are part of scikit-learn."""

    def size(self, split: str) -> int | None:
        return {"train": 1438, "test": 359}.get(split)

    def has_validation(self) -> bool:
        return False

    def class_names(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    def load(self, split: str) -> TensorImages:
        from sklearn.datasets import load_digits  # a second of import time, needed by this source only

        data = load_digits()
        labels = torch.from_numpy(data.target).long()
        train, test = stratified_split(labels, 0.2, seed=0)
        chosen = train if split == "train" else test
        grey = torch.from_numpy(data.images)[chosen].mul(255 / 16).round().to(torch.uint8)
        return TensorImages(grey[:, None].repeat(1, 3, 1, 1), labels[chosen])


def check_labels(name: str, labels: Tensor, num_classes: int, every_class: bool) -> None:
    """Raise ``UserError`` unless labels lie in 0..num_classes-1 and, with ``every_class``, all of them occur."""
    found = labels.unique()
    outside = bool(found.numel() == 0 or found[0] < 0 or found[-1] >= num_classes)
    if outside or (every_class and len(found) != num_classes):
        raise UserError(f"{name} holds labels of {len(found)} classes; exactly 0..{num_classes - 1} are expected")

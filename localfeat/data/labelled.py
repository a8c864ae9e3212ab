"""Labelled images behind a DataLoader: one tensor in memory, or files decoded on demand."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from localfeat.data.decode import read_image
from localfeat.errors import UserError

Batch = tuple[Tensor, Tensor]


class LabelledImages(Dataset[Batch]):
    """Images of one split; subclasses fetch a whole batch at once."""

    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Tensor) -> Batch:
        """Images (B, 3, h, w) uint8 and labels (B,) int64 at ``indices`` (B,) int64."""
        raise NotImplementedError

    def subset(self, indices: Tensor) -> "LabelledImages":
        """The images at ``indices`` (M,), in that order, without copying pixels."""
        return _Subset(self, indices)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.fetch(torch.tensor([index]))
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Any:
        # A worker process would wrap an error in its own many-line traceback; handed over as a value it
        # is raised unchanged by `BatchLoader`.
        try:
            return self.fetch(torch.as_tensor(indices))
        except UserError as error:
            return error


class TensorImages(LabelledImages):
    """All images as one uint8 tensor (N, 3, h, w); a batch is one indexing operation."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def fetch(self, indices: Tensor) -> Batch:
        return self.images[indices], self.labels[indices]


class FileImages(LabelledImages):
    """Image files decoded when asked for, each resized and cropped to ``size`` x ``size`` pixels."""

    def __init__(self, paths: Sequence[Path], labels: Tensor, size: int) -> None:
        self.paths = list(paths)
        self.labels = labels
        self.size = size

    def fetch(self, indices: Tensor) -> Batch:
        images = [torch.from_numpy(read_image(self.paths[i], self.size)) for i in indices.tolist()]
        return torch.stack(images).permute(0, 3, 1, 2).contiguous(), self.labels[indices]


class _Subset(LabelledImages):
    def __init__(self, parent: LabelledImages, indices: Tensor) -> None:
        self.parent = parent
        self.indices = indices
        self.labels = parent.labels[indices]

    def fetch(self, indices: Tensor) -> Batch:
        return self.parent.fetch(self.indices[indices])


def keep_batch(batch: Any) -> Any:
    """Collate function for datasets whose ``__getitems__`` already returns a batch."""
    return batch


class BatchLoader(DataLoader[Batch]):
    """A DataLoader that starts working at the first batch, not at ``iter()``, and raises one-line errors.

    Lightning calls ``iter()`` before it has told the sampler the epoch; a loader that prefetches there would
    draw the wrong epoch.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


def batch_loader(dataset: Dataset[Batch], num_workers: int, **batching: Any) -> BatchLoader:
    """A loader over a dataset with ``__getitems__``; ``batching`` is ``batch_size`` or ``batch_sampler``.

    It has its own generator, because a DataLoader otherwise draws from the global one at each epoch, which
    a resumed run would do at another time.
    """
    return BatchLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=keep_batch,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        **batching,
    )

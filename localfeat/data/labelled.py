"""Datasets of labelled images (one tensor in memory, or files decoded on demand) and their loader."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from localfeat.data.bad_files import BadFiles, BadImage
from localfeat.data.decode import read_image
from localfeat.data.pixels import RGB, Pixels
from localfeat.utils.errors import RunFailed, UserError
from localfeat.utils.text import shown

Batch = tuple[Tensor, Tensor]


class LabelledImages(Dataset[Batch]):
    """Images of one split; subclasses fetch a whole batch at once."""

    labels: Tensor  # (N,) int64
    bad: BadFiles | None = None  # if set, files that cannot be decoded are left out

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Tensor) -> Batch:
        """Return the images (B, C, h, w) and labels (B,) int64 at ``indices`` (B,) int64."""
        raise NotImplementedError

    def subset(self, indices: Tensor) -> "LabelledImages":
        """Return the images at ``indices`` (M,), in that order, without copying pixels."""
        return _Subset(self, indices)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.fetch(torch.tensor([index]))
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        # A worker process would wrap an exception in its own many-line traceback, so it is returned as a value and
        # `BatchLoader` raises it unchanged. `BatchLoader` also reports the files that were left out.
        try:
            batch = self.fetch(torch.tensor(indices))
        except (UserError, RunFailed) as error:
            return error
        left_out = self.bad.take_unsaid() if self.bad else []
        return (*batch, left_out) if left_out else batch


class TensorImages(LabelledImages):
    """All images as one tensor (N, C, h, w); a batch is one indexing operation."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def fetch(self, indices: Tensor) -> Batch:
        return self.images[indices], self.labels[indices]


class FileImages(LabelledImages):
    """Image files decoded on demand, each cropped and resized to ``size`` (height, width).

    With ``bad``, files that cannot be decoded are left out of their batches. That costs nothing and depends only on
    the files, so a resumed run sees the same batches; finding them before training would take a pass over all images
    at every start.

    Raises:
        UserError: when fetching: a bad file without ``bad``, or a batch or class in which no file can be decoded.
        RunFailed: when fetching: the system cannot read a file.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        size: tuple[int, int],
        bad: BadFiles | None = None,
        pixels: Pixels = RGB,
    ) -> None:
        self.paths = list(paths)
        self.labels = labels
        self.size = size
        self.bad = bad
        self.pixels = pixels
        self._sound: set[int] = set()  # classes with at least one file that could be decoded

    def fetch(self, indices: Tensor) -> Batch:
        images, kept = [], []
        for index in indices.tolist():
            try:
                image = read_image(self.paths[index], self.size, self.pixels)
            except BadImage as error:
                if self.bad is None:
                    raise
                self._check_class(index)
                self.bad.leave_out(error)
            else:
                images.append(torch.from_numpy(image))
                kept.append(index)
        if not images:
            example = shown(self.paths[int(indices[0])])
            raise UserError(f"none of the {len(indices)} images of a batch can be decoded, such as {example}")
        return torch.stack(images).permute(0, 3, 1, 2).contiguous(), self.labels[kept]

    def _check_class(self, bad: int) -> None:
        """Refuse the class of file number ``bad`` if none of its files can be decoded."""
        label = int(self.labels[bad])
        if label in self._sound:
            return
        members = (self.labels == label).nonzero()[:, 0].tolist()
        if not any(_is_sound(self.paths[index], self.pixels) for index in members):
            raise UserError(no_sound_image(self.paths[bad], len(members)))
        self._sound.add(label)


def no_sound_image(path: Path, count: int) -> str:
    """Return the message for a class whose ``count`` files are all bad; ``path`` is one of them."""
    return f"none of the {count} images of the class of {shown(path)} can be decoded; replace them or delete the class"


def _is_sound(path: Path, pixels: Pixels) -> bool:
    try:
        read_image(path, pixels=pixels)
    except BadImage:
        return False
    return True


class _Subset(LabelledImages):
    def __init__(self, parent: LabelledImages, indices: Tensor) -> None:
        self.parent = parent
        self.indices = indices
        self.labels = parent.labels[indices]
        self.bad = parent.bad

    def fetch(self, indices: Tensor) -> Batch:
        return self.parent.fetch(self.indices[indices])


def keep_batch(batch: Any) -> Any:
    """Return the batch unchanged: the collate function for datasets whose ``__getitems__`` returns a batch."""
    return batch


class BatchLoader(DataLoader[Batch]):
    """A DataLoader that starts working at the first batch, not at ``iter()``, and raises one-line errors.

    Lightning calls ``iter()`` before it tells the sampler the epoch, so prefetching there would draw the wrong epoch.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        try:
            while (batch := _next_batch(batches)) is not None:
                if isinstance(batch, UserError | RunFailed):
                    raise batch
                if len(batch) == 3:  # with the messages about files that a worker process has left out
                    bad = cast(LabelledImages, self.dataset).bad
                    assert bad is not None
                    bad.say(batch[2])
                yield tuple(batch[:2])
        finally:
            del batches  # end the worker processes now: an exception would keep this frame, and so them, alive


def _next_batch(batches: Iterator[Any]) -> Any:
    """Return the DataLoader's next batch, None at the end, a ``RunFailed`` if a worker process has died.

    It is returned, not raised: its traceback would keep this frame, and so the dead worker's loader, alive.
    """
    try:
        return next(batches, None)
    except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two: killed while it hands a batch over
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if isinstance(error, RuntimeError) and not text.startswith("RuntimeError: DataLoader worker"):
            raise
        return RunFailed(
            f"a process that reads images has died, often for lack of memory: a lower dataset.num_workers needs less "
            f"({text})"
        )


def _leave_signals_to_parent(worker: int) -> None:
    """Keep a worker process alive when Ctrl-C or a scheduler's signal reaches the whole process group.

    The main process may still need its workers to finish its batch and write a checkpoint. They end when it tells them
    to, by SIGTERM too, or when it dies.
    """
    for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def batch_loader(dataset: Dataset[Batch], num_workers: int, **batching: Any) -> BatchLoader:
    """Return a loader for a dataset with ``__getitems__``; ``batching`` is ``batch_size`` or ``batch_sampler``.

    It has its own generator: a DataLoader without one draws from the global generator at each epoch, which a resumed
    run would do at a different time.
    """
    return BatchLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=keep_batch,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_parent if num_workers else None,
        **batching,
    )

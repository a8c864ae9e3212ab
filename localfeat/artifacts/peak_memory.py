"""The most memory that training takes: measured on CUDA, counted everywhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils._pytree import tree_leaves

from localfeat.memory.tracker import StorageTracker

GIB = 1024**3
WARM_UP_BATCHES = 2
"""Batches at the start of a run that measure compilation, autotuning and cold caches rather than training."""

CUDA_SOURCE = "torch.cuda.max_memory_allocated"
ACCOUNTING_SOURCE = "allocator accounting of one training batch"


class PeakMemory(Callback):
    """The most memory that training takes, in bytes.

    On CUDA: ``torch.cuda.max_memory_allocated`` over all of training, validation left out (its batches may be larger
    and have no graph). On every other device: the allocations of one training batch, counted by ``StorageTracker``
    on top of weights, buffers, optimizer state, gradients and the batch itself. That batch is the third of the run,
    when optimizer states exist, or the last one of a shorter run; with accumulation the one of the second optimizer
    step, when every module's gradients are alive too. A resumed run keeps the figure of its earlier part,
    unless it has moved between CPU and GPU.

    Attributes:
        peak_bytes: the figure; None until taken, and for ever if no batch could be measured.
        reserved_bytes: ``torch.cuda.max_memory_reserved``; None off CUDA.
        source: where ``peak_bytes`` comes from; None as long as there is none.
        slow_batch: 0-based number, within this fit, of the batch that the accounting slows down; None on CUDA.
    """

    def __init__(self) -> None:
        self._restored = False
        self._start_over()

    def _start_over(self) -> None:
        self.peak_bytes: int | None = None
        self.reserved_bytes: int | None = None
        self.source: str | None = None
        self.slow_batch: int | None = None
        self._batches = 0
        self._tracker: StorageTracker | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        cuda = pl_module.device.type == "cuda"
        kept = self._restored and (self.source == CUDA_SOURCE) == cuda
        if not kept:
            self._start_over()
        self._restored = False
        if cuda:
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        elif self.peak_bytes is None:
            ahead = max(0, batch_to_measure(trainer, pl_module) - trainer.global_step)
            self.slow_batch = max(0, min(ahead, remaining_batches(trainer) - 1))

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("peak_bytes", "reserved_bytes", "source")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start_over()
        self._restored = True
        self.peak_bytes, self.reserved_bytes = state_dict["peak_bytes"], state_dict["reserved_bytes"]
        self.source = state_dict["source"]

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._batches == self.slow_batch:
            self._tracker = StorageTracker(existing_tensors(trainer, pl_module, batch))
            self._tracker.__enter__()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        tracker = self._leave()
        if tracker is not None:
            self.peak_bytes = tracker.peak_bytes
            self.source = ACCOUNTING_SOURCE

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._read_cuda(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._measures_cuda(trainer, pl_module) and not trainer.sanity_checking:
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._read_cuda(trainer, pl_module)
        if self.peak_bytes is not None:
            pl_module.log("memory/peak_gib", self.peak_bytes / GIB, rank_zero_only=True)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._read_cuda(trainer, pl_module)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._leave()

    def _leave(self) -> StorageTracker | None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.__exit__(None, None, None)
        return tracker

    def _measures_cuda(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> bool:
        return pl_module.device.type == "cuda" and trainer.state.fn == "fit"

    def _read_cuda(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._measures_cuda(trainer, pl_module) and self._batches:
            device = pl_module.device
            self.peak_bytes = max(self.peak_bytes or 0, torch.cuda.max_memory_allocated(device))
            self.reserved_bytes = max(self.reserved_bytes or 0, torch.cuda.max_memory_reserved(device))
            self.source = CUDA_SOURCE


def batch_to_measure(trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> int:
    """0-based number, within the run, of a batch as heavy as any: it updates, and optimizer states exist."""
    accumulate = getattr(getattr(pl_module, "optimization", None), "accumulate", 1)
    per_epoch = trainer.num_training_batches
    window = int(min(accumulate, per_epoch))
    second_step = 2 * window - 1 if per_epoch >= 2 * window else int(per_epoch) + window - 1
    return max(WARM_UP_BATCHES, second_step) if window > 1 else WARM_UP_BATCHES


def remaining_batches(trainer: lightning.Trainer) -> int:
    """How many training batches this fit has still to run; a large number where nothing limits it."""
    limits: list[float] = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        # After a resume at an epoch's end the progress still shows that epoch's batches: hence the remainder.
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed % trainer.num_training_batches
        limits.append((trainer.max_epochs - trainer.current_epoch) * trainer.num_training_batches - done)
    if trainer.max_steps >= 0:
        limits.append(trainer.max_steps - trainer.global_step)
    least = min(limits, default=math.inf)
    return int(least) if math.isfinite(least) else 2**62


def existing_tensors(trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any) -> Iterator[Tensor]:
    """All that is allocated when a step begins: weights, buffers, gradients, optimizer state, the batch."""
    for parameter in pl_module.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from pl_module.buffers()
    state = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
    yield from (leaf for leaf in tree_leaves([state, batch]) if isinstance(leaf, Tensor))

"""Training images per second."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils._pytree import tree_leaves

from localfeat.run.callbacks.peak_memory import WARM_UP_BATCHES, PeakMemory


class Throughput(Callback):
    """Training images per second of wall time.

    An epoch is timed from its first batch's start to its last batch's end: waiting for the loader counts, validation
    does not. The first two batches of a run and the one that ``PeakMemory`` slows down are excluded with their time.
    CUDA is not synchronized per batch, only when the clock starts or stops: after excluded batches, before validation,
    and at the ends of epochs. A resumed run keeps the figures of its earlier part.

    Attributes:
        epochs: images per second of every epoch with at least one timed batch, over all ranks.
        outside: for the same epochs, the share of time outside ``on_train_batch_start`` to ``on_train_batch_end``:
            loader, logging, checkpoints. On CUDA this is the host's time, and the host may run ahead of the device.
    """

    def __init__(self) -> None:
        self._restored = False
        self._start_over()

    def _start_over(self) -> None:
        self.epochs: list[float] = []
        self.outside: list[float] = []
        self._earlier = 0.0
        self._started: float | None = None
        self._batches = 0
        self._left_out: set[int] = set()
        self._reset_epoch()

    def _reset_epoch(self) -> None:
        self._images = 0
        self._seconds = 0.0
        self._inside = 0.0
        self._mark: float | None = None  # None while the clock is stopped

    @property
    def images_per_second(self) -> float | None:
        """Median over the timed epochs; None without a timed epoch."""
        return median(self.epochs) if self.epochs else None

    @property
    def seconds_outside_step(self) -> float | None:
        """Median share (0 to 1) of an epoch's time spent outside the training step; None without a timed epoch."""
        return median(self.outside) if self.outside else None

    @property
    def latest(self) -> float | None:
        """Images per second of the current epoch so far, else of the last one; for progress displays."""
        if self._images:
            return self._images / self._seconds
        return self.epochs[-1] if self.epochs else None

    @property
    def seconds(self) -> float:
        """Wall time of training so far, validation included.

        For a resumed run it covers all parts, without work after the last checkpoint of a killed part.
        """
        return self._earlier + (0.0 if self._started is None else time.perf_counter() - self._started)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "outside": self.outside, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start_over()
        self._restored = True
        self.epochs, self.outside = list(state_dict["epochs"]), list(state_dict["outside"])
        self._earlier = state_dict["seconds"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not self._restored:
            self._start_over()
        self._restored = False
        self._started = time.perf_counter()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._earlier, self._started = self.seconds, None

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._batches:
            slow = {callback.slow_batch for callback in peak_memory_callbacks(trainer)}
            self._left_out = {*range(WARM_UP_BATCHES), *(number for number in slow if number is not None)}
        self._step_start = time.perf_counter()
        if self._mark is None:
            self._mark = self._step_start

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        left_out = self._batches in self._left_out
        ends = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if ends or (left_out and self._batches + 1 not in self._left_out):
            synchronize(pl_module.device)
        now = time.perf_counter()
        if not left_out and self._mark is not None:
            self._images += batch_size(batch) * trainer.world_size
            self._seconds += now - self._mark
            self._inside += now - self._step_start
        self._batches += 1
        self._mark = now

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._mark is not None and not trainer.is_last_batch and self._images:
            # Validation in mid-epoch: the device's remaining work belongs to the counted batches.
            synchronize(pl_module.device)
            rest = time.perf_counter() - self._mark
            self._seconds += rest
            self._inside += rest
        self._mark = None

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._images:
            self.epochs.append(self._images / self._seconds)
            self.outside.append(1 - self._inside / self._seconds)
            pl_module.log("speed/images_per_second", self.epochs[-1], rank_zero_only=True)
            pl_module.log("speed/outside_step", self.outside[-1], rank_zero_only=True)
        self._reset_epoch()


def peak_memory_callbacks(trainer: lightning.Trainer) -> list[PeakMemory]:
    """Return the ``PeakMemory`` callbacks of this trainer (usually one or none)."""
    return [callback for callback in getattr(trainer, "callbacks", []) if isinstance(callback, PeakMemory)]


def batch_size(batch: Any) -> int:
    """Return the length of the first tensor's first dimension."""
    return next(int(leaf.shape[0]) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))


def synchronize(device: torch.device) -> None:
    """Wait for the queued work of a CUDA device; do nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

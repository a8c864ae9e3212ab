"""Peak memory of training: measured on CUDA, counted on other devices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from localfeat.learner.lightning_internals import averaged_model
from localfeat.memory.tracker import StorageTracker
from localfeat.memory.windows import ModuleWindows

GIB = 1024**3
WARM_UP_BATCHES = 2
"""Batches at the start of a run, which would measure compilation, autotuning and cold caches rather than training."""

CUDA_SOURCE = "torch.cuda.max_memory_allocated"
ACCOUNTING_SOURCE = "allocator accounting of one training batch"


class PeakMemory(Callback):
    """Peak memory of training in bytes, overall and for each of ``local_modules``.

    On CUDA this is ``torch.cuda.max_memory_allocated`` over all of training without validation, whose batches may be
    larger and have no graph. On other devices ``StorageTracker`` counts the allocations of one training batch, on top
    of weights (and their moving average), buffers, optimizer state, gradients and the batch itself. That batch is the
    third of the run, when optimizer states exist, or the last one of a shorter run; with accumulation it is that of
    the second optimizer step, when every module's gradients are alive, too. Compiled modules run uncompiled while they
    are counted. A resumed run keeps the figures of its earlier part, unless it moved between CPU and GPU.

    On every device the modules' peaks come from ``ModuleWindows`` in that batch. They include persistent memory, so the
    largest of them is the overall peak (on CUDA: at most that).

    Attributes:
        peak_bytes: the overall peak; None until measured.
        reserved_bytes: ``torch.cuda.max_memory_reserved``; None on other devices. It includes validation, because the
            allocator keeps what it has reserved.
        module_peak_bytes: ``{"module_1": bytes, …}``; empty until measured and without ``local_modules``.
        source: how ``peak_bytes`` was measured; None until then.
        slow_batch: 0-based number, within this fit, of the batch that accounting slows down; None on CUDA.
    """

    SAVED = ("peak_bytes", "reserved_bytes", "module_peak_bytes", "source")

    def __init__(self) -> None:
        self._restored = False
        self._start_over()

    def _start_over(self) -> None:
        self.peak_bytes: int | None = None
        self.reserved_bytes: int | None = None
        self.module_peak_bytes: dict[str, int] = {}
        self.source: str | None = None
        self.slow_batch: int | None = None
        self._measured_batch: int | None = None
        self._batches = 0
        self._tracker: StorageTracker | None = None
        self._windows: ModuleWindows | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        cuda = on_cuda(pl_module)
        kept = self._restored and (self.source == CUDA_SOURCE) == cuda
        if not kept:
            self._start_over()
        self._restored = False
        if not (self.module_peak_bytes if cuda else self.peak_bytes):
            ahead = max(0, batch_to_measure(trainer, pl_module) - trainer.global_step)
            self._measured_batch = max(0, min(ahead, remaining_batches(trainer) - 1))
        if cuda:
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        else:
            self.slow_batch = self._measured_batch

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.SAVED}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start_over()
        self._restored = True
        for name in self.SAVED:
            setattr(self, name, state_dict[name])

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._batches != self._measured_batch:
            return
        if on_cuda(pl_module):
            take_peak = partial(self._take_cuda, pl_module.device)
        else:
            self._tracker = StorageTracker(existing_tensors(trainer, pl_module, batch))
            self._tracker.__enter__()
            take_peak = partial(take_counted, self._tracker)
        self._windows = ModuleWindows(local_modules(pl_module), take_peak)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        windows = self._windows
        if windows is not None:
            windows.close()
            self._leave()
            self.module_peak_bytes = windows.peaks
            if not on_cuda(pl_module):
                self.peak_bytes, self.source = windows.overall, ACCOUNTING_SOURCE

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._read_cuda(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._measures_cuda(trainer, pl_module) and not trainer.sanity_checking:
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._read_cuda(trainer, pl_module)
        peaks = {f"{name}_peak": value for name, value in self.module_peak_bytes.items()}
        if self.peak_bytes is not None:
            peaks["peak"] = self.peak_bytes
        pl_module.log_dict({f"memory/{name}_gib": value / GIB for name, value in peaks.items()}, rank_zero_only=True)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._read_cuda(trainer, pl_module)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        """Remove hooks and stop accounting; figures not measured by now are lost."""
        tracker, windows = self._tracker, self._windows
        self._tracker = self._windows = None
        if windows is not None:
            windows.remove()
        if tracker is not None:
            tracker.__exit__(None, None, None)

    def _measures_cuda(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> bool:
        return on_cuda(pl_module) and trainer.state.fn == "fit"

    def _read_cuda(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._measures_cuda(trainer, pl_module) and self._batches:
            self._keep_cuda(pl_module.device)

    def _keep_cuda(self, device: torch.device) -> int:
        """Raise the figures to CUDA's peaks since the last reset; return the allocated one."""
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        self.peak_bytes = max(self.peak_bytes or 0, allocated)
        self.reserved_bytes = max(self.reserved_bytes or 0, reserved)
        self.source = CUDA_SOURCE
        return allocated

    def _take_cuda(self, device: torch.device) -> int:
        # The allocator counts on the host when tensors are created, so there is no need to synchronize.
        allocated = self._keep_cuda(device)
        torch.cuda.reset_peak_memory_stats(device)
        return allocated


def take_counted(tracker: StorageTracker) -> int:
    """Return the tracker's peak and reset it."""
    peak = tracker.peak_bytes
    tracker.reset_peak()
    return peak


def on_cuda(pl_module: lightning.LightningModule) -> bool:
    """Return whether the model's device has an allocator that keeps statistics."""
    return pl_module.device.type == "cuda"


def local_modules(pl_module: lightning.LightningModule) -> Iterable[nn.Module]:
    """Return a learner's local modules; nothing for any other model."""
    modules = getattr(pl_module, "local_modules", None)
    return modules if isinstance(modules, nn.ModuleList) else ()


def batch_to_measure(trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> int:
    """Return the 0-based number, within the run, of a batch with an update when optimizer states exist."""
    accumulate = getattr(getattr(pl_module, "optimization", None), "accumulate", 1)
    per_epoch = trainer.num_training_batches
    window = int(min(accumulate, per_epoch))
    second_step = 2 * window - 1 if per_epoch >= 2 * window else int(per_epoch) + window - 1
    return max(WARM_UP_BATCHES, second_step) if window > 1 else WARM_UP_BATCHES


def remaining_batches(trainer: lightning.Trainer) -> int:
    """Return the number of training batches left in this fit; a very large number without a limit."""
    limits: list[float] = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        # After resuming at an epoch's end the progress still counts that epoch's batches, hence the remainder.
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed % trainer.num_training_batches
        limits.append((trainer.max_epochs - trainer.current_epoch) * trainer.num_training_batches - done)
    if trainer.max_steps >= 0:
        limits.append(trainer.max_steps - trainer.global_step)
    least = min(limits, default=math.inf)
    return int(least) if math.isfinite(least) else 2**62


def existing_tensors(trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any) -> Iterator[Tensor]:
    """Yield all tensors when a step begins: weights, buffers, gradients, optimizer state, averages, the batch.

    Some scalars, a few KiB in all, are ignored: states of metrics, sums of losses, a GradScaler's scale. Schedules hold
    no tensors.
    """
    for parameter in pl_module.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from pl_module.buffers()
    yield from getattr(getattr(pl_module, "nonfinite", None), "held", [])  # copies of BatchNorm's statistics
    yield from averaged_tensors(trainer, pl_module.device)
    state = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
    yield from (leaf for leaf in tree_leaves([state, batch]) if isinstance(leaf, Tensor))


def averaged_tensors(trainer: lightning.Trainer, device: torch.device) -> Iterator[Tensor]:
    """Yield the copies of weights and buffers that weight averaging keeps on ``device``.

    Lightning copies the model before moving it, so a run on a GPU keeps its average in main memory unless the callback
    is given a device.
    """
    for callback in getattr(trainer, "callbacks", []):
        average = averaged_model(callback)
        if average is not None:
            kept = [*average.parameters(), *average.buffers()]
            yield from (tensor for tensor in kept if tensor.device == device)

"""Callbacks that save a run's best and last state, and average its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from torch.optim.swa_utils import get_ema_avg_fn

from localfeat.learner.lightning_internals import log_now, resume_by_epochs
from localfeat.run.loggers.metrics_csv import MetricsCsv
from localfeat.utils.errors import Stopped


class BestCheckpoint(Checkpoint):
    """Saves the epoch with the highest validation accuracy as ``best.ckpt``; among equal epochs, the latest.

    On a small validation set many epochs are equal (all images right), and a later one has trained longer at a lower
    learning rate.

    Args:
        file: the path of the run's ``best.ckpt``.

    Attributes:
        score: the highest accuracy so far, 0 to 1; None before the first validation.
        epoch: the epoch with that accuracy, from 0.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.score: float | None = None
        self.epoch: int | None = None

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = float(trainer.callback_metrics["val/accuracy"])
        if self.score is None or score >= self.score:
            self.score, self.epoch = score, trainer.current_epoch
            trainer.save_checkpoint(self.file)

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score, self.epoch = state_dict["score"], state_dict["epoch"]


class LastCheckpoint(Checkpoint):
    """Overwrites ``last.ckpt``, from which a killed run is resumed, and writes it once more when the run ends.

    It saves the state of the callbacks before it in the trainer's list, so keep it last. A checkpoint or stop that is
    due at an epoch's last batch waits for the epoch's end, because Lightning would resume without that epoch's
    validation.

    Args:
        file: the path of the run's ``last.ckpt``.
        epochs: the number of epochs between checkpoints.
        batches: the number of batches between checkpoints within epochs; None for none.
        stop: returns the signal that asks the run to stop, or None. The run then ends with ``Stopped`` once the
            current batch is in ``last.ckpt``.
    """

    def __init__(
        self, file: Path, *, epochs: int = 1, batches: int | None = None, stop: Callable[[], int | None] | None = None
    ) -> None:
        self.file = file
        self.epochs, self.batches = epochs, batches
        self.stop = stop or (lambda: None)
        self._due = self._at_epoch_end = False

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        resume_by_epochs(trainer)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record whether early stopping has ended the run, so that resuming it adds no epoch."""
        checkpoint["stopped_early"] = trainer.should_stop and self._at_epoch_end

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        trainer.should_stop = checkpoint.get("stopped_early", False)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Count the last epoch of a run that had ended before it was resumed; Lightning does not."""
        if stage == "fit" and trainer.fit_loop.done:
            progress: Any = trainer.fit_loop.epoch_progress.current
            progress.completed = progress.processed

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._due = self.batches is not None and trainer.global_step % self.batches == 0
        if not trainer.is_last_batch and not _reaches_max_steps(trainer):
            self._save_or_stop(trainer, self._due)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        due = self._due or (trainer.current_epoch + 1) % self.epochs == 0 or is_last_epoch(trainer)
        self._at_epoch_end = True
        try:
            self._save_or_stop(trainer, due)
        finally:
            self._at_epoch_end = False

    def _save_or_stop(self, trainer: lightning.Trainer, due: bool) -> None:
        signum = self.stop()
        if due or signum is not None:
            self._due = False
            log_now(trainer)
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCsv):
                    logger.sync()
            trainer.save_checkpoint(self.file)
        if signum is not None:
            raise Stopped(signum)


class AveragedWeights(WeightAveraging):
    """An exponential moving average of the weights, updated at optimizer steps, not at batches that only accumulate.

    Lightning's own goes by ``global_step``, which counts all batches here. It also averages integer buffers and
    truncates them, so that Swin would look up its position biases at wrong indices; those are copied here.
    """

    def __init__(self, decay: float) -> None:
        mean = get_ema_avg_fn(decay)
        super().__init__(avg_fn=lambda mine, now, count: mean(mine, now, count) if mine.is_floating_point() else now)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not holds_gradients(pl_module):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def holds_gradients(pl_module: lightning.LightningModule) -> bool:
    """Return whether gradients are being accumulated; an optimizer step clears them."""
    return any(parameter.grad is not None for parameter in pl_module.parameters())


def is_last_epoch(trainer: lightning.Trainer) -> bool:
    """Return whether the epoch that is ending is the last one."""
    epochs = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.should_stop or epochs or _reaches_max_steps(trainer)


def _reaches_max_steps(trainer: lightning.Trainer) -> bool:
    return trainer.max_steps > 0 and trainer.global_step == trainer.max_steps

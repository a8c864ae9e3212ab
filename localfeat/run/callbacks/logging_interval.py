"""The logging interval of runs with few batches."""

from __future__ import annotations

import lightning
from lightning.pytorch.callbacks import Callback


class LogShortRuns(Callback):
    """Lowers the trainer's ``log_every_n_steps`` to the batches of an epoch, so that every epoch logs training metrics.

    A run with fewer batches would otherwise log none.
    """

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        steps = [trainer.num_training_batches] + [trainer.max_steps] * (trainer.max_steps > 0)
        trainer.log_every_n_steps = int(min(trainer.log_every_n_steps, *steps))  # type: ignore[attr-defined]

"""Uses of Lightning's private names. Each function says why; ``tests/unit/learner`` has a test for each."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import AveragedModel


def count_batch(trainer: lightning.Trainer) -> None:
    """Move ``trainer.global_step`` by one.

    Lightning counts optimizer steps, of which a batch has K here, or none while it only accumulates (Lightning #17958).
    """
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.increment_ready()
    progress.increment_completed()


def resume_by_epochs(trainer: lightning.Trainer) -> None:
    """Make Lightning resume at an epoch's end with the next epoch, also under ``max_steps``.

    Otherwise it counts the finished epoch twice and skips the next one.
    """
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]


def log_now(trainer: lightning.Trainer) -> None:
    """Log now what Lightning would log right after this hook.

    A run killed between a checkpoint and Lightning's logging would otherwise lose these figures on resuming. A run that
    is not killed logs them twice, for the same step.
    """
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    if connector._first_loop_iter is None:  # at an epoch's end
        epoch = torch.tensor(trainer.current_epoch)
        connector.log_metrics({**connector.metrics["log"], "epoch": epoch}, step=loop._batches_that_stepped - 1)
    else:
        connector.update_train_step_metrics()


def averaged_model(callback: Any) -> AveragedModel | None:
    """Return the model copy of a ``WeightAveraging`` callback; ``None`` before it is made."""
    return callback._average_model if isinstance(callback, WeightAveraging) else None

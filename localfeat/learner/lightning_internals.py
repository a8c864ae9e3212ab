"""What no public name of Lightning does. Each function says why; ``tests/unit/learner`` has a test for each."""

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
    """Have Lightning resume from an epoch's end with the next epoch also if there are ``max_steps``.

    It would count the ended epoch a second time, and leave the next one out.
    """
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]


def log_now(trainer: lightning.Trainer) -> None:
    """Give loggers what Lightning would give them right after this hook.

    No public call does: a run that is killed between a checkpoint and Lightning's logging would resume behind figures
    that nobody has written. They come a second time if it is not, for the same step.
    """
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    if connector._first_loop_iter is None:  # at an epoch's end
        epoch = torch.tensor(trainer.current_epoch)
        connector.log_metrics({**connector.metrics["log"], "epoch": epoch}, step=loop._batches_that_stepped - 1)
    else:
        connector.update_train_step_metrics()


def averaged_model(callback: Any) -> AveragedModel | None:
    """The copy of the model that a ``WeightAveraging`` keeps, whose memory counts; None before it is made."""
    return callback._average_model if isinstance(callback, WeightAveraging) else None

"""Which states of a run are kept."""

from __future__ import annotations

from pathlib import Path

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor


class LastCheckpoint(ModelCheckpoint):
    """Overwrites ``last.ckpt`` every so many epochs, or every so many batches: what a run goes on from."""

    def __init__(self, folder: Path, *, epochs: int | None = None, batches: int | None = None) -> None:
        super().__init__(
            dirpath=folder,
            filename="last",
            every_n_epochs=epochs,
            every_n_train_steps=batches,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )


class BestCheckpoint(ModelCheckpoint):
    """Keeps the epoch with the highest validation accuracy; of equal ones the latest.

    Lightning keeps the earliest. A small validation set has many equal epochs (all images right), and the later
    one has a smaller learning rate behind it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            dirpath=folder, filename="best", monitor="val/accuracy", mode="max", enable_version_counter=False
        )

    def check_monitor_top_k(self, trainer: lightning.Trainer, current: Tensor | None = None) -> bool:
        """Whether ``current`` is at least as good as the best so far."""
        ties = current is not None and self.best_model_score is not None and bool(current == self.best_model_score)
        return ties or super().check_monitor_top_k(trainer, current)

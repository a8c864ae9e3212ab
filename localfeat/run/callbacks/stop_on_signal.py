"""Delay signals until a batch is trained and saved."""

from __future__ import annotations

import lightning
from lightning.pytorch.callbacks import Callback

from localfeat.run.signals import StopRequest


class StopOnSignal(Callback):
    """Lets signals wait for ``LastCheckpoint`` while batches are trained.

    Attributes:
        began: whether training has begun in this process.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.began = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.request.install()  # replaces Lightning's, which exit with code 0 or save within a step
        self.request.waits = self.began = True

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.request.waits = False

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self.request.waits = False

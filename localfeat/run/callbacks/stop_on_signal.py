"""Signals while batches are trained."""

from __future__ import annotations

import lightning
from lightning.pytorch.callbacks import Callback

from localfeat.run.signals import StopRequest


class StopOnSignal(Callback):
    """While batches are trained, signals wait for ``LastCheckpoint`` to save.

    Attributes:
        began: whether training has begun in this process.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.began = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.request.install()  # Lightning's own handlers, there by now, end with exit code 0 or save within a step
        self.request.waits = self.began = True

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.request.waits = False

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self.request.waits = False

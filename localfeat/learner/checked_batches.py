"""Batches of a user's own loader are checked before the step, in which nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
from torch import Tensor, nn

from localfeat.learner.inputs import check_batch
from localfeat.methods.base import Method


class CheckedBatches(lightning.LightningModule):
    """Checks ``(images, labels)`` from loaders without a datamodule's ``prepare``.

    Attributes:
        method: whether it contrasts the images of a batch.
        num_classes: the classifier's classes.

    Raises:
        UserError: a batch is not what `check_batch` wants.
    """

    method: Method
    num_classes: int
    _backbone: tuple[nn.Module]  # not registered: its parameters live in the local modules

    @property
    def backbone(self) -> nn.Module:
        """The timm model that is being trained."""
        return self._backbone[0]

    @property
    def _prepares(self) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """The datamodule's ``prepare``, if there is one."""
        return getattr(getattr(self.trainer, "datamodule", None), "prepare", None)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Check a training batch."""
        self._check(batch, batch_idx, training=True)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check a validation batch."""
        self._check(batch, batch_idx, training=False)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check a test batch."""
        self._check(batch, batch_idx, training=False)

    def _check(self, batch: Any, number: int, *, training: bool) -> None:
        """Check a batch; labels' values on a GPU only in the first, as reading them waits.

        A method that compares images needs two, but the rest at the end of an epoch may be one.
        """
        if self._prepares is None:
            check_batch(
                batch,
                self.num_classes,
                training=training,
                values=number == 0 or self.device.type == "cpu",
                at_least=self.method.fewest_images if training and number == 0 else 1,
                backbone=self.backbone,
            )

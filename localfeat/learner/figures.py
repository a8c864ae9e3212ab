"""The figures of training batches: the latest ones, and their means over an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from localfeat.methods.local_module import LocalOutput


class TrainingFigures:
    """Losses, their terms and the accuracy, kept on the device without waiting for it.

    Attributes:
        epoch_means: means of the last finished epoch, by name; a non-finite loss makes its mean non-finite.
        latest: scalars of the current batch.
    """

    def __init__(self) -> None:
        self.epoch_means: dict[str, float] = {}
        self.latest: dict[str, Tensor] = {}
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Reset the means."""
        self._sums: dict[str, Tensor] = {}
        self._batches = 0

    def end_epoch(self) -> None:
        """Compute the epoch's means."""
        if self._batches:
            self.epoch_means = {name: float(value) / self._batches for name, value in self._sums.items()}

    def add(self, index: int, output: LocalOutput, labels: Tensor) -> None:
        """Add the figures of one module (from 0) for a batch with labels (B,) or (B, num_classes)."""
        prefix = f"train/module_{index + 1}"
        figures = {f"{prefix}/{name}": value for name, value in output.terms.items()}
        figures[f"{prefix}/loss"] = output.loss.detach()
        if output.logits is not None:
            truth = labels.argmax(1) if labels.is_floating_point() else labels
            figures["train/accuracy"] = (output.logits.argmax(1) == truth).float().mean()
            figures["train/loss"] = output.terms["cross_entropy"]
        for name, value in figures.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self.latest = {**(self.latest if index else {}), **figures}

    def count(self) -> None:
        """Count a batch, after its last module."""
        self._batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch_means, "sums": self._sums, "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch_means, self._sums, self._batches = dict(state["epoch"]), dict(state["sums"]), state["batches"]

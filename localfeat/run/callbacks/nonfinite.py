"""Report losses and gradients that are not finite, save the batch, and stop the run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from localfeat.learner.module import Learner
from localfeat.learner.nonfinite import AnomalyFound, Trouble
from localfeat.utils.errors import Diverged, UserError
from localfeat.utils.files import write_whole

FILE = "nonfinite_batch.safetensors"
SEED_NOTE = (
    "torch.manual_seed(torch_seed) before the batch gives its augmentation, dropout and drop path again "
    "where every batch was seeded, as in the runs of localfeat.run"
)


@dataclass(frozen=True)
class Batch:
    """A training batch and its metrics.

    Attributes:
        images, labels: the batch as the loader returned it.
        epoch, index: the numbers of epoch and batch, from 0.
        figures: the batch's metrics (``train/module_1/loss`` and others), scalars on the device.
        folder: the run's folder.
        seed: torch's seed at the start of the batch, unless it was set since.
    """

    images: Tensor
    labels: Tensor
    epoch: int
    index: int
    figures: Mapping[str, Tensor]
    folder: str | Path
    seed: int = field(default_factory=torch.initial_seed)

    def __str__(self) -> str:
        return f"epoch {self.epoch}, batch {self.index}"

    def write(self, facts: Mapping[str, Any]) -> str:
        """Write the batch to ``nonfinite_batch.safetensors`` in the folder; return its path or an error, as text."""
        file = Path(self.folder) / FILE
        parts = {"images": self.images, "labels": self.labels}
        if not all(isinstance(part, Tensor) for part in parts.values()):
            return "its batch was not saved because it is not made of tensors"
        tensors = {name: part.detach().cpu().contiguous().clone() for name, part in parts.items()}
        known = {"epoch": self.epoch, "batch": self.index, "torch_seed": self.seed, "torch_seed_note": SEED_NOTE}
        try:
            write_whole(file, save(tensors, {name: str(value) for name, value in {**facts, **known}.items()}))
        except OSError as error:
            return f"its batch could not be written to {file} ({error.strerror or error})"
        return f"its batch is in {file}"


def read_batch(file: str | Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Return images, labels and metadata of a ``nonfinite_batch.safetensors``.

    The metadata are strings: ``module``, ``term``, ``value``, ``epoch``, ``batch``, ``torch_seed``,
    ``torch_seed_note``, and ``parameter`` if a gradient was not finite.
    """
    with safe_open(file, "pt") as content:
        return content.get_tensor("images"), content.get_tensor("labels"), dict(content.metadata())


class StopOnNonFinite(Callback):
    """Warns once per module that skips a step, and ends the run when a module skips too many steps in a row.

    The learner skips and counts such steps with or without this callback; the limit is its
    ``optimization.stop_after_nonfinite``. On a GPU the check is made only when metrics are logged, because it waits for
    the device.

    Raises:
        Diverged: at the end of a batch. That batch (with accumulation, the last one whose loss was not finite) is
            written to the trainer's ``default_root_dir``.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._batch: tuple[Any, int] = (None, 0)  # the current batch and its number
        self._named: set[int] = set()
        self._suspects: dict[int, tuple[Batch, Trouble]] = {}  # latest bad loss of modules without a step since

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._begin()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch, batch_idx

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        learner = as_learner(pl_module)
        self._batch = None, batch_idx  # free its memory
        if learner.device.type == "cpu" or learner.logs_batch or torch.is_anomaly_enabled():
            self.look(learner, described(trainer, learner, batch, batch_idx), trainer.optimizers)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Save the batch in which anomaly detection found an operation, and add its path to the message."""
        if isinstance(exception, AnomalyFound):
            batch = described(trainer, as_learner(pl_module), *self._batch)
            facts = {"module": f"module_{exception.module}", "term": exception.operation, "value": "nan"}
            exception.args = (f"{exception}; {batch.write(facts)}",)

    def look(self, learner: Learner, batch: Batch, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Check a batch after it was trained on. Waits for the device.

        Raises:
            Diverged: a module has skipped too many steps in a row.
        """
        nonfinite = learner.nonfinite
        limit = 1 if torch.is_anomaly_enabled() else learner.optimization.stop_after_nonfinite
        skipped, in_a_row = nonfinite.skipped, nonfinite.in_a_row
        find = lambda module: nonfinite.trouble(module, batch.figures, optimizers[module])  # noqa: E731
        losses = torch.stack([batch.figures[f"train/module_{n}/loss"] for n in range(1, len(skipped) + 1)])
        for module, finite in enumerate(losses.isfinite().tolist()):
            if not finite:
                self._suspects[module] = batch, find(module)
            elif not in_a_row[module]:
                self._suspects.pop(module, None)
        for module, count in enumerate(skipped):
            if count and module not in self._named:
                self._named.add(module)
                now = in_a_row[module] > 0 and nonfinite.stepped
                warn_of(module, batch, (self._suspects.get(module) or (batch, find(module))) if now else None)
        for module, count in enumerate(in_a_row):
            if limit is not None and count >= limit and nonfinite.stepped:
                raise Diverged(last_words(module, count, limit, *(self._suspects.get(module) or (batch, find(module)))))
        if losses.is_cuda:
            self._suspects.clear()  # frees their images; the next check is many batches away


def described(trainer: lightning.Trainer, learner: Learner, batch: Any, index: int) -> Batch:
    """Return a batch (images, labels) with its number in the epoch and its metrics."""
    images, labels = batch
    return Batch(images, labels, trainer.current_epoch, index, learner.figures.latest, trainer.default_root_dir)


def as_learner(pl_module: lightning.LightningModule) -> Learner:
    """Return ``pl_module`` as a ``Learner``, which counts skipped steps.

    Raises:
        UserError: it is not a ``Learner``.
    """
    if not isinstance(pl_module, Learner):
        raise UserError(f"StopOnNonFinite works with a localfeat.Learner, not with {type(pl_module).__name__}")
    return pl_module


def warn_of(module: int, batch: Batch, found: tuple[Batch, Trouble] | None) -> None:
    """Warn on stderr that a module (from 0) skips a step; ``found`` is the batch and the reason, if known."""
    what = f"a loss or gradient of module {module + 1} was not finite before {batch}"
    if found is not None:
        what = f"{found[1]} at {found[0]}"
    print(f"warning: {what}: the module skips such steps, summary.json counts them", file=sys.stderr)


def last_words(module: int, count: int, limit: int, batch: Batch, trouble: Trouble) -> str:
    """Write the batch and return the run's last line."""
    facts = {"module": f"module_{module + 1}", "term": trouble.term, "value": trouble.value}
    facts |= {} if trouble.parameter is None else {"parameter": trouble.parameter}
    written = batch.write(facts)
    if torch.is_anomaly_enabled():
        return f"{trouble} at {batch} (trainer.detect_anomaly=true): {written}"
    return (
        f"{trouble} at {batch}, and this module has skipped {count} steps in a row "
        f"(optimizer.stop_after_nonfinite={limit}): {written}; start again with a lower optimizer.lr, or use "
        "trainer.detect_anomaly=true to find the operation"
    )

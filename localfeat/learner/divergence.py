"""What a run says, keeps and does when losses or gradients are not finite."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from localfeat.learner.nonfinite import NonFinite, Trouble
from localfeat.utils.errors import Diverged
from localfeat.utils.files import write_whole

FILE = "nonfinite_batch.safetensors"
SEED_NOTE = (
    "torch.manual_seed(torch_seed) before the batch gives its augmentation, dropout and drop path again "
    "where every batch was seeded, as in the runs of localfeat.run"
)


@dataclass(frozen=True)
class Batch:
    """A training batch and what became of it.

    Attributes:
        images, labels: as the loader gave them.
        epoch, index: both from 0.
        figures: ``train/module_1/loss`` and the like, scalars on the device.
        folder: of the run.
        seed: of torch's generator when the batch began, if nobody has set it since.
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
        """Write it to ``nonfinite_batch.safetensors`` in the folder; returns where it is, or why it is nowhere."""
        file = Path(self.folder) / FILE
        parts = {"images": self.images, "labels": self.labels}
        if not all(isinstance(part, Tensor) for part in parts.values()):
            return "its batch was not kept, as it is not made of tensors"
        tensors = {name: part.detach().cpu().contiguous().clone() for name, part in parts.items()}
        known = {"epoch": self.epoch, "batch": self.index, "torch_seed": self.seed, "torch_seed_note": SEED_NOTE}
        try:
            write_whole(file, save(tensors, {name: str(value) for name, value in {**facts, **known}.items()}))
        except OSError as error:
            return f"its batch could not be written to {file} ({error.strerror or error})"
        return f"its batch is in {file}"


def read_batch(file: str | Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Images, labels and facts of a ``nonfinite_batch.safetensors``.

    The facts are texts: ``module``, ``term``, ``value``, ``epoch``, ``batch``, ``torch_seed``, ``torch_seed_note``, and
    ``parameter`` where a gradient was not finite.
    """
    with safe_open(file, "pt") as content:
        return content.get_tensor("images"), content.get_tensor("labels"), dict(content.metadata())


class Divergence:
    """Ends a run one of whose modules no longer takes steps; names every module that leaves one out, once.

    Args:
        limit: steps that a module may leave out in a row, less one; None: any number.
    """

    def __init__(self, nonfinite: NonFinite, limit: int | None) -> None:
        self.nonfinite = nonfinite
        self.limit = limit
        self._named: set[int] = set()
        self._suspects: dict[int, tuple[Batch, Trouble]] = {}  # the latest bad loss of modules that took no step since

    def look(self, batch: Batch, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """After a batch. Waits for the device.

        Raises:
            Diverged: a module has left out too many steps in a row. The batch, or of an accumulation window the last
                one whose loss was not finite, is written into the run's folder.
        """
        limit = 1 if torch.is_anomaly_enabled() else self.limit
        skipped, in_a_row = self.nonfinite.skipped, self.nonfinite.in_a_row
        losses = torch.stack([batch.figures[f"train/module_{n}/loss"] for n in range(1, len(skipped) + 1)])
        for module, finite in enumerate(losses.isfinite().tolist()):
            if not finite:
                self._suspects[module] = batch, self.nonfinite.trouble(module, batch.figures, optimizers[module])
            elif not in_a_row[module]:
                self._suspects.pop(module, None)
        for module, count in enumerate(skipped):
            if count and module not in self._named:
                self._name(module, batch, optimizers, now=in_a_row[module] > 0 and self.nonfinite.stepped)
        for module, count in enumerate(in_a_row):
            if limit is not None and count >= limit and self.nonfinite.stepped:
                raise Diverged(self._last_words(module, count, *self._suspect(module, batch, optimizers)))
        if losses.is_cuda:
            self._suspects.clear()  # the memory of their images; the next look is many batches away

    def anomaly(self, module: int, operation: str, batch: Batch) -> Diverged:
        """What to raise when anomaly detection has found the operation in a module (from 0)."""
        facts = {"module": f"module_{module + 1}", "term": operation, "value": "nan"}
        return Diverged(f"module {module + 1} at {batch}: {operation}; {batch.write(facts)}")

    def _suspect(self, module: int, batch: Batch, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[Batch, Trouble]:
        known = self._suspects.get(module)
        return known or (batch, self.nonfinite.trouble(module, batch.figures, optimizers[module]))

    def _name(self, module: int, batch: Batch, optimizers: Sequence[torch.optim.Optimizer], *, now: bool) -> None:
        self._named.add(module)
        what = f"some loss or gradient of module {module + 1} was not finite before {batch}"
        if now:
            found, trouble = self._suspect(module, batch, optimizers)
            what = f"{trouble} at {found}"
        print(f"warning: {what}: the module does not take such steps, summary.json counts them", file=sys.stderr)

    def _last_words(self, module: int, count: int, batch: Batch, trouble: Trouble) -> str:
        facts = {"module": f"module_{module + 1}", "term": trouble.term, "value": trouble.value}
        facts |= {} if trouble.parameter is None else {"parameter": trouble.parameter}
        written = batch.write(facts)
        if torch.is_anomaly_enabled():
            return f"{trouble} at {batch} (trainer.detect_anomaly=true): {written}"
        return (
            f"{trouble} at {batch}, and {count} steps of this module in a row were left out "
            f"(optimizer.stop_after_nonfinite={self.limit}): {written}; begin anew with a lower optimizer.lr, or look: "
            "trainer.detect_anomaly=true names the operation"
        )

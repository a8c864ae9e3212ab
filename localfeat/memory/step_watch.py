"""The storages of one training step by purpose, at the peak of every local module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor, nn

from localfeat.memory.event_log import EventLog, StorageRecord
from localfeat.memory.tracker import StorageTracker


@dataclass(frozen=True)
class MemoryShares:
    """Bytes of memory by purpose at one moment.

    ``weights`` are parameters, buffers and their moving average. ``activations`` are tensors that a forward pass made
    and the backward pass needs, with the batch, the images and the features for the next module. ``temporaries`` are
    the rest: tensors that a forward pass frees itself, that a backward pass makes or recomputes, and the optimizer's
    scratch.
    """

    weights: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    activations: int = 0
    temporaries: int = 0

    @property
    def peak_bytes(self) -> int:
        """Their sum."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        """Return the shares and ``peak_bytes``."""
        return {"peak_bytes": self.peak_bytes, **asdict(self)}


@dataclass(frozen=True)
class StepMemory:
    """The memory of one training step.

    Attributes:
        modules: the shares at every local module's peak. A module's window goes from the start of its forward pass to
            that of the next module's; the first one begins with the preparation of the batch.
    """

    modules: list[MemoryShares]

    @property
    def hungriest(self) -> int:
        """Number, from 1, of the module that sets the peak; the first of equals."""
        return 1 + max(range(len(self.modules)), key=lambda i: self.modules[i].peak_bytes)

    @property
    def total(self) -> MemoryShares:
        """The shares at the step's peak."""
        return self.modules[self.hungriest - 1]

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once."""
        return self.total.peak_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON: the total's shares, ``hungriest``, and a list ``modules`` of such shares."""
        return {**self.total.to_dict(), "hungriest": self.hungriest, "modules": [m.to_dict() for m in self.modules]}


class _Tracker(StorageTracker):
    """Count meta tensors and, with ``host_too``, those on the host: an optimizer's state has some scalars there."""

    def __init__(self, baseline: Iterable[Tensor], log: EventLog, host_too: bool) -> None:
        super().__init__(baseline, log)
        self._host_too = host_too

    def add(self, tensor: Tensor) -> None:
        if self._host_too or tensor.device.type == "meta":
            super().add(tensor)


class StepWatch:
    """Record when the modules and backward passes of one step begin, and which storages are gradients."""

    def __init__(
        self, weights: list[Tensor], states: list[Tensor], batch: tuple[Tensor, Tensor], host_too: bool
    ) -> None:
        self.log = EventLog()
        self.batch = batch
        self.starts: list[int] = []  # moments at which the modules' forward passes begin
        self.backwards: list[int] = []  # and their backward passes
        self._kind: dict[StorageRecord, str] = {}
        self._weights, self._states = weights, states
        self.tracker = _Tracker([], self.log, host_too)

    def begin(self, gradients: list[Tensor]) -> None:
        """Register every tensor that exists before the step."""
        persistent = {
            "weights": self._weights,
            "optimizer_state": self._states,
            "gradients": gradients,
            "activations": self.batch,
        }
        for kind, tensors in persistent.items():
            for tensor in tensors:
                self.tracker.add(tensor)
                self._note(tensor, kind)

    def module_begins(self, *_: Any) -> None:
        self.starts.append(self.log.moment)

    def backward_begins(self) -> None:
        self.backwards.append(self.log.moment)

    def has_gradients(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            if parameter.grad is not None:
                self._note(parameter.grad, "gradients")

    def _note(self, tensor: Tensor, kind: str) -> None:
        record = self.tracker.record(tensor)
        if record is not None:
            self._kind.setdefault(record, kind)

    def result(self) -> StepMemory:
        """Return the shares at each module's peak."""
        for record in self.log.records:
            if self._is_activation(record):
                self._kind.setdefault(record, "activations")
        bounds = [0, *self.starts[1:], self.log.moment]
        return StepMemory([self._shares(moment) for moment, _ in self.log.peaks(bounds)])

    def _is_activation(self, record: StorageRecord) -> bool:
        """Tell whether a storage was made before a backward pass of the same module and is alive when that begins."""
        begins = [0, *self.starts[1:]]  # the first module's batch is prepared before its forward pass
        for begin, backward in zip(begins, self.backwards, strict=True):
            if begin < record.born <= backward:
                return record.died is None or record.died > backward
        return False

    def _shares(self, moment: int) -> MemoryShares:
        totals = dict.fromkeys((field.name for field in fields(MemoryShares)), 0)
        for record in self.log.alive(moment):
            totals[self._kind.get(record, "temporaries")] += record.size
        return MemoryShares(**totals)

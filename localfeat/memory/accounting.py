"""The memory of a training step, predicted on the meta device: the peak, whose it is, and what it is made of."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from localfeat.errors import UserError
from localfeat.memory.emulation import AUTOCAST_DTYPES, Emulation, Precision, Target
from localfeat.memory.event_log import EventLog, StorageRecord
from localfeat.memory.tracker import StorageTracker
from localfeat.optimization import undecayed_parameters

if TYPE_CHECKING:
    from localfeat.learner import Learner


@dataclass(frozen=True)
class MemoryShares:
    """What memory held at one moment, in bytes.

    ``weights`` are parameters, buffers and their moving average. ``activations`` are what a module's forward pass
    made and its backward pass waits for, with the batch, the images and the features handed on. ``temporaries`` are
    all else: what a forward pass frees itself, what a backward pass makes on its way (also what it computes again),
    the optimizer's scratch.
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
        """The shares, and ``peak_bytes``."""
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
        """Plain numbers for JSON: the total's figures, ``hungriest``, and a list ``modules`` of the same figures."""
        return {**self.total.to_dict(), "hungriest": self.hungriest, "modules": [m.to_dict() for m in self.modules]}


def step_memory(
    learner: Learner,
    *,
    batch_size: int,
    image_size: int,
    target: Target,
    precision: Precision,
    source_shape: tuple[int, int] | None = None,
    accumulate: int | None = None,
    soft_labels: bool = False,
    ema: bool = False,
) -> StepMemory:
    """What one training step of ``learner`` would take on ``target``, without running it there.

    It runs the learner's own loop on a copy without data, as in the middle of a run: optimizer states exist. With
    accumulation the step is one that updates, when all modules' gradients are alive. Augmentation is not run: only
    its result is counted.

    Args:
        learner: on any device, the meta device included; it stays as it is.
        batch_size: images per batch.
        image_size: side in pixels of the square images that the network sees.
        target: ``cuda`` or ``cpu``.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``, for which Lightning takes ``bf16-mixed`` on a CPU.
        source_shape: height and width in pixels of the uint8 images that are sent to the device and stay there for
            the whole step; ``None`` for loaders of normalised float images.
        accumulate: batches per optimizer step; ``None`` takes the learner's.
        soft_labels: labels are probabilities (B, classes), as under mixup.
        ema: the device holds a moving average of weights and buffers as well (Lightning's callback keeps it in main
            memory unless it is given a device).

    Raises:
        UserError: sizes below 1; a precision or target that is not known.
    """
    accumulate = learner.optimization.accumulate if accumulate is None else accumulate
    for name, value in (("batch_size", batch_size), ("image_size", image_size), ("accumulate", accumulate)):
        if value < 1:
            raise UserError(f"{name}={value}: it must be at least 1")
    if target not in ("cuda", "cpu"):
        raise UserError(f"target={target}: memory is predicted for cuda and cpu")
    if precision not in AUTOCAST_DTYPES:
        raise UserError(f"precision={precision}: memory is predicted for {', '.join(AUTOCAST_DTYPES)}")
    precision = "bf16-mixed" if (target, precision) == ("cpu", "16-mixed") else precision
    batch = _Batch(batch_size, image_size, source_shape, learner.num_classes if soft_labels else None)
    with Emulation(target, precision):
        step = _Step(on_meta(learner), batch, accumulate, scaled=precision == "16-mixed")
        step.run(updates=True)
        if accumulate > 1:
            step.run(updates=False)
        return step.record(host_too=target == "cpu", ema=ema)


def on_meta(learner: Learner) -> Learner:
    """A copy in training mode with all parameters and buffers on the meta device, at no cost in memory."""
    # What deepcopy finds in its memo it takes for copied already: nothing with data is ever duplicated.
    memo: dict[int, Any] = {id(learner._trainer): None}
    for module in (learner, learner.backbone):
        for parameter in module.parameters():
            bare = torch.empty_like(parameter, device="meta", requires_grad=False)
            memo[id(parameter)] = nn.Parameter(bare, requires_grad=parameter.requires_grad)
        for buffer in module.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for value in (learner._sums, learner._latest):
        memo[id(value)] = {}
    return copy.deepcopy(learner, memo).train()


@dataclass(frozen=True)
class _Batch:
    """Makes batches without data: sent to the device, and turned into float images there."""

    size: int
    image_size: int
    source_shape: tuple[int, int] | None
    soft_classes: int | None

    def send(self) -> tuple[Tensor, Tensor]:
        labels = torch.empty(self.size, dtype=torch.int64, device="meta")
        if self.source_shape is None:
            return self._images(), self._soft(labels)
        return torch.empty(self.size, 3, *self.source_shape, dtype=torch.uint8, device="meta"), labels

    def prepare(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (images, labels) if self.source_shape is None else (self._images(), self._soft(labels))

    def _images(self) -> Tensor:
        return torch.empty(self.size, 3, self.image_size, self.image_size, device="meta")

    def _soft(self, labels: Tensor) -> Tensor:
        return labels if self.soft_classes is None else torch.empty(self.size, self.soft_classes, device="meta")


class _Tracker(StorageTracker):
    """Counts meta tensors, and on demand those on the host: there are some scalars in an optimizer's state."""

    def __init__(self, baseline: Iterable[Tensor], log: EventLog, host_too: bool) -> None:
        super().__init__(baseline, log)
        self._host_too = host_too

    def add(self, tensor: Tensor) -> None:
        if self._host_too or tensor.device.type == "meta":
            super().add(tensor)


class _Step:
    """The learner's loop with what a trainer adds to it: optimizers, accumulation, clipping, a loss scale."""

    def __init__(self, learner: Learner, batch: _Batch, accumulate: int, scaled: bool) -> None:
        self.learner = learner
        self.batch = batch
        self.accumulate = accumulate
        self.scale = torch.ones((), device="meta") if scaled else None
        never_decayed = undecayed_parameters(learner.backbone)
        build = learner.optimization.build
        self.modules: Sequence[nn.Module] = list(learner.local_modules)
        self.optimizers = [build(module, never_decayed, fused=not scaled) for module in self.modules]

    def run(self, updates: bool, watch: _Watch | None = None) -> None:
        """One batch; ``updates`` says whether the optimizers step, or gradients pile up."""
        images, labels = sent = self.batch.send() if watch is None else watch.batch
        done = iter(range(len(self.modules)))

        def backward(loss: Tensor) -> None:
            index = next(done)
            if watch is not None:
                watch.backward_begins()
            loss = loss / self.accumulate
            loss = loss if self.scale is None else loss * self.scale
            with torch.autocast("meta", enabled=False):
                loss.backward()
            if watch is not None:
                watch.has_gradients(self.modules[index])

        self.learner.train_modules(
            lambda: self.batch.prepare(images, labels), backward, self._update if updates else _keep_gradients
        )
        del sent  # a trainer holds the batch until its step has ended

    def _update(self, index: int) -> None:
        optimizer = self.optimizers[index]
        with torch.autocast("meta", enabled=False):
            self.learner.on_before_optimizer_step(optimizer)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def record(self, host_too: bool, ema: bool) -> StepMemory:
        """The next step, which updates, under a tracker."""
        weights = [*self.learner.parameters(), *self.learner.buffers()]
        if ema:
            counter = torch.empty((), dtype=torch.int64, device="meta")  # of updates
            weights += [*(torch.empty_like(weight) for weight in weights), counter]
        watch = _Watch(weights, list(self._states()), self.batch.send(), host_too)
        gradients = [p.grad for p in self.learner.parameters() if p.grad is not None]
        watch.begin(gradients)
        del gradients
        hooks = [module.register_forward_pre_hook(watch.module_begins) for module in self.modules]
        try:
            with watch.tracker:
                self.run(updates=True, watch=watch)
        finally:
            for hook in hooks:
                hook.remove()
        return watch.result()

    def _states(self) -> Iterator[Tensor]:
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def _keep_gradients(index: int) -> None:
    """What a batch that only accumulates does after a module's backward pass."""


class _Watch:
    """Follows one step: when modules begin, when their backward passes begin, which storages are gradients."""

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
        """Register everything that is there before the step."""
        standing = {
            "weights": self._weights,
            "optimizer_state": self._states,
            "gradients": gradients,
            "activations": self.batch,
        }
        for kind, tensors in standing.items():
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
        """The shares at each module's peak."""
        for record in self.log.records:
            if self._is_activation(record):
                self._kind.setdefault(record, "activations")
        bounds = [0, *self.starts[1:], self.log.moment]
        return StepMemory([self._shares(moment) for moment, _ in self.log.peaks(bounds)])

    def _is_activation(self, record: StorageRecord) -> bool:
        """Made in the preparation of the batch or in a forward pass, and alive when a backward pass begins."""
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

"""The memory of a training step, predicted on the meta device: the peak, its module and its shares."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from localfeat.backbones.bare import bare_tensors
from localfeat.backbones.timm_models import channels_of
from localfeat.learner.optimization import undecayed_parameters
from localfeat.memory.emulation import AUTOCAST_DTYPES, Emulation, Precision, Target
from localfeat.memory.step_watch import MemoryShares, StepMemory, StepWatch
from localfeat.memory.work import WorkCounter
from localfeat.utils.errors import UserError
from localfeat.utils.sizes import sides

if TYPE_CHECKING:
    from localfeat.learner.module import Learner

__all__ = ["MemoryShares", "StepMemory", "on_meta", "step_flops", "step_memory"]


def step_memory(
    learner: Learner,
    *,
    batch_size: int,
    image_size: int | Sequence[int],
    target: Target,
    precision: Precision,
    source: Tensor | None = None,
    accumulate: int | None = None,
    soft_labels: bool = False,
    ema: bool = False,
) -> StepMemory:
    """Predict the memory of one training step of ``learner`` on ``target``, without running it there.

    It runs the learner's own loop on a copy without data, as in the middle of a run: optimizer states exist. With
    accumulation the step is one that updates, when all modules' gradients are alive. Augmentation is not run: only
    its result is counted. Compiled modules are counted uncompiled.

    Args:
        learner: on any device, the meta device included; it stays as it is.
        batch_size: images per batch.
        image_size: side in pixels of the images that the network sees, or height and width.
        target: ``cuda`` or ``cpu``.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``, for which Lightning takes ``bf16-mixed`` on a CPU.
        source: one image (C, h, w) as the loader gives them, on the meta device; batches of them are sent to the device
            and stay there for the whole step. ``None`` for loaders of normalised float images.
        accumulate: batches per optimizer step; ``None`` takes the learner's.
        soft_labels: labels are probabilities (B, classes), as under mixup.
        ema: the device holds a moving average of weights and buffers as well (Lightning's callback keeps it in main
            memory unless it is given a device).

    Raises:
        UserError: a size below 1, or an unknown precision or target.
    """
    accumulate = learner.optimization.accumulate if accumulate is None else accumulate
    for name, value in (("batch_size", batch_size), ("accumulate", accumulate)):
        if value < 1:
            raise UserError(f"{name}={value}: it must be at least 1")
    if target not in ("cuda", "cpu"):
        raise UserError(f"target={target}: memory is predicted for cuda and cpu")
    if precision not in AUTOCAST_DTYPES:
        raise UserError(f"precision={precision}: memory is predicted for {', '.join(AUTOCAST_DTYPES)}")
    precision = "bf16-mixed" if (target, precision) == ("cpu", "16-mixed") else precision
    shape = channels_of(learner.backbone), *sides(image_size)
    batch = _Batch(batch_size, shape, source, learner.num_classes if soft_labels else None)
    with Emulation(target, precision):
        step = _Step(on_meta(learner), batch, accumulate, scaled=precision == "16-mixed")
        step.run(updates=True)
        if accumulate > 1:
            step.run(updates=False)
        return step.record(host_too=target == "cpu", ema=ema)


def step_flops(learner: Learner, *, batch_size: int, image_size: int | Sequence[int], soft_labels: bool = False) -> int:
    """Return the FLOPs of one training step of ``learner``: products, convolutions and attention.

    It runs the learner's own loop on a copy without data, like :func:`step_memory`. Recomputation is counted;
    what works element by element, augmentation and optimizers are not.

    Args:
        learner: on any device, the meta device included; it stays as it is.
        batch_size: images per batch.
        image_size: side in pixels of the images that the network sees, or height and width.
        soft_labels: labels are probabilities (B, classes), as under mixup.
    """
    shape = channels_of(learner.backbone), *sides(image_size)
    batch = _Batch(batch_size, shape, None, learner.num_classes if soft_labels else None)
    with WorkCounter() as work:
        on_meta(learner).train_modules(batch.send, Tensor.backward, _keep_gradients)
    return work.flops


def on_meta(learner: Learner) -> Learner:
    """Return a copy in training mode with all parameters and buffers on meta, which takes no memory."""
    memo = {id(learner._trainer): None, **bare_tensors(learner), **bare_tensors(learner.backbone)}
    memo |= dict.fromkeys(map(id, learner.figures_of_training), None)
    bare = copy.deepcopy(learner, memo).train()
    bare.forget_training()
    return bare


@dataclass(frozen=True)
class _Batch:
    """Make batches without data: send them to the device, and turn them into float images there."""

    size: int
    shape: tuple[int, int, int]  # channels, height and width of the images that the network sees
    source: Tensor | None
    soft_classes: int | None

    def send(self) -> tuple[Tensor, Tensor]:
        labels = torch.empty(self.size, dtype=torch.int64, device="meta")
        if self.source is None:
            return self._images(), self._soft(labels)
        return self.source.new_empty(self.size, *self.source.shape), labels

    def prepare(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (images, labels) if self.source is None else (self._images(), self._soft(labels))

    def _images(self) -> Tensor:
        return torch.empty(self.size, *self.shape, device="meta")

    def _soft(self, labels: Tensor) -> Tensor:
        return labels if self.soft_classes is None else torch.empty(self.size, self.soft_classes, device="meta")


class _Step:
    """The learner's loop with the trainer's additions: optimizers, accumulation, clipping, a loss scale."""

    def __init__(self, learner: Learner, batch: _Batch, accumulate: int, scaled: bool) -> None:
        self.learner = learner
        self.batch = batch
        self.accumulate = accumulate
        self.scale = torch.ones((), device="meta") if scaled else None
        never_decayed = undecayed_parameters(learner.backbone, learner.local_modules)
        build = learner.optimization.build
        self.modules: Sequence[nn.Module] = list(learner.local_modules)
        self.optimizers = [build(module, never_decayed, fused=not scaled) for module in self.modules]

    def run(self, updates: bool, watch: StepWatch | None = None) -> None:
        """Run one batch, held to the end; if ``updates``, step the optimizers, else accumulate gradients."""
        images, labels = self.batch.send() if watch is None else watch.batch
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

    def _update(self, index: int) -> None:
        optimizer = self.optimizers[index]
        with torch.autocast("meta", enabled=False):
            self.learner.on_before_optimizer_step(optimizer)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.modules[index].objective.after_step()  # type: ignore[operator, union-attr]

    def record(self, host_too: bool, ema: bool) -> StepMemory:
        """Run the next step, which updates, under a tracker, and return its memory."""
        weights = [*self.learner.parameters(), *self.learner.buffers(), *self.learner.nonfinite.held]
        if ema:
            counter = torch.empty((), dtype=torch.int64, device="meta")  # of updates
            weights += [*(torch.empty_like(weight) for weight in weights), counter]
        watch = StepWatch(weights, list(self._states()), self.batch.send(), host_too)
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
    """Do nothing after a module's backward pass: the batch only accumulates."""

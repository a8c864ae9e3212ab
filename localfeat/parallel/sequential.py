"""The sequential schedule: all modules on one device, one after the other, each forward, backward and update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from localfeat.methods.local_module import LocalModule, LocalOutput


class Observer(Protocol):
    """What is told how far a batch is."""

    def begin_module(self, index: int) -> None:
        """The module (from 0) begins its forward pass."""

    def see_output(self, index: int, output: LocalOutput, labels: Tensor) -> None:
        """The module has run backward from ``output.loss``; its gradients are there."""


def train_in_turn(
    modules: Sequence[LocalModule],
    batch: Callable[[], tuple[Tensor, Tensor]],
    backward: Callable[[Tensor], None],
    update: Callable[[int], None],
    observer: Observer,
) -> None:
    """Train every module on one batch. At most one module's graph is alive at a time.

    Args:
        modules: in order; each takes the features of the one before, detached.
        batch: makes the normalised images (B, 3, H, W) and their labels. They belong to this loop alone, which
            frees the images after the last module that needs them.
        backward: runs backward from one module's loss.
        update: steps the optimizer of a module (counted from 0) and frees its gradients, if it is time to.
        observer: is told when a module begins and what came out.
    """
    last_image_user = max((i for i, module in enumerate(modules) if module.objective.uses_images), default=0)
    features, labels = batch()
    images: Tensor | None = features
    for index, module in enumerate(modules):
        observer.begin_module(index)
        output: LocalOutput = module(features, images, labels)
        backward(output.loss)
        features = output.features
        if index == last_image_user:
            images = None
        observer.see_output(index, output, labels)
        del output  # and with it the module's graph
        update(index)

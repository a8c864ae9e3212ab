"""The sequential schedule: on one device, each module in turn runs forward, backward and its update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from localfeat.methods.local_module import LocalModule, LocalOutput


class Observer(Protocol):
    """An object that is notified as a batch progresses."""

    def begin_module(self, index: int) -> None:
        """Be told that module ``index`` (from 0) begins its forward pass."""

    def see_output(self, index: int, output: LocalOutput, labels: Tensor) -> None:
        """Be told that the module has run backward from ``output.loss``, so its gradients are available."""


def train_in_turn(
    modules: Sequence[LocalModule],
    batch: Callable[[], tuple[Tensor, Tensor]],
    backward: Callable[[Tensor], None],
    update: Callable[[int], None],
    observer: Observer,
) -> None:
    """Train every module on one batch. At most one module's graph is alive at a time.

    Args:
        modules: the local modules in order; each takes the detached features of the one before.
        batch: function that makes the normalised images (B, C, H, W) and their labels. Only this loop may hold them:
            it frees the images after the last module that needs them.
        backward: function that runs backward from one module's loss.
        update: function that steps the optimizer of a module (counted from 0) and frees its gradients, if it is due.
        observer: object that is told when a module begins and what it returned.
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

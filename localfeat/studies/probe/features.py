"""Load a run's network and take the spatial means of its blocks' outputs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from localfeat.backbones.decompose import Decomposition
from localfeat.data.datamodule import ImageDataModule
from localfeat.data.labelled import BatchLoader, LabelledImages, batch_loader
from localfeat.learner.assembly import cut_for
from localfeat.learner.module import Learner
from localfeat.run.build import build_datamodule
from localfeat.run.configuration import RunConfiguration
from localfeat.run.finished import open_learner, saved_configuration
from localfeat.run.folder import RunFolder
from localfeat.utils.errors import UserError

SAMPLE_SEED = 0
"""The same for all runs, so that runs on the same split are measured on the same images."""


@dataclass(frozen=True)
class Place:
    """A place in the network where features are taken: after a block, or (``block`` is None) the patch embeddings."""

    block: int | None
    """Counted from 0."""
    module: int
    """The block's local module, counted from 1."""
    channels: int
    ends_module: bool


@dataclass(frozen=True)
class Features:
    """Features of N images: ``means[i]`` (N, C_i) at the i-th place, all on the CPU."""

    means: list[Tensor]
    labels: Tensor  # (N,)
    predictions: Tensor  # (N,), of the network's own classifier


@dataclass(frozen=True)
class Network:
    """A run's network in evaluation mode, with its dataset."""

    folder: RunFolder
    configuration: RunConfiguration
    datamodule: ImageDataModule
    learner: Learner
    pieces: Decomposition

    @property
    def name(self) -> str:
        return self.learner.method.name

    @property
    def places(self) -> list[Place]:
        """Patch embeddings first, then every block."""
        ends = list(accumulate(self.learner.blocks_per_module))
        found = [Place(None, 1, self.pieces.shapes[0].channels, False)]
        for block, shape in enumerate(self.pieces.shapes[1:]):
            module = 1 + sum(end <= block for end in ends)
            found.append(Place(block, module, shape.channels, block + 1 in ends))
        return found

    @torch.no_grad()
    def features(self, loader: BatchLoader) -> Features:
        """Return the features of a loader's images, resized and normalised as in the run, not augmented, in float32.

        Raises:
            UserError: the features are not finite.
        """
        means: list[list[Tensor]] = []
        labels, predictions = [], []
        for images, truth in loader:
            device = self.learner.device
            inputs, _ = self.datamodule.prepare(images.to(device), truth.to(device), training=False)
            taken, logits = self._through(inputs)
            means.append(taken)
            labels.append(truth)
            predictions.append(logits.argmax(1).cpu())
        joined = [torch.cat(parts) for parts in zip(*means, strict=True)]
        self._check_finite(joined)
        return Features(joined, torch.cat(labels), torch.cat(predictions))

    def _through(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the spatial means at every place, of patch tokens only, and the logits."""
        x = self.pieces.stem(images)
        taken = [self._mean(x, 0)]
        for number, block in enumerate(self.pieces.blocks, start=1):
            x = block(x)
            taken.append(self._mean(x, number))
        return taken, self.pieces.tail(x)

    def _mean(self, x: Tensor, place: int) -> Tensor:
        return self.pieces.shapes[place].to_nchw(x).mean((2, 3)).cpu()  # (B, C)

    def _check_finite(self, means: list[Tensor]) -> None:
        for number, values in enumerate(means):
            if not values.isfinite().all():
                where = f"block {number}" if number else "the patch embeddings"
                raise UserError(f"{self.folder}: the features of {where} are not finite, the training has diverged")


def open_network(folder: RunFolder, checkpoint: str, root: str | Path | None) -> Network:
    """Return the network of the run in ``folder``; ``root`` is its dataset's folder if that has moved.

    Raises:
        UserError: no such run or checkpoint, or missing data.
    """
    configuration = saved_configuration(folder)
    if root is not None:
        configuration = configuration.with_root(root)
    datamodule = build_datamodule(configuration)
    learner = open_learner(folder, configuration, datamodule.num_classes, checkpoint)
    # Layers between stages go with the next block whatever the split, so that networks can be compared block by block.
    pieces = cut_for(learner.backbone, configuration.image_size).eval()
    return Network(folder, configuration, datamodule, learner, pieces)


def sample(datamodule: ImageDataModule, split: str, count: int) -> BatchLoader:
    """Return a loader of ``count`` random images of a split (or all, if fewer), in order and not augmented.

    Raises:
        UserError: no such split.
    """
    everything = datamodule.ordered_loader(split)
    images = cast(LabelledImages, everything.dataset)
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    chosen = torch.randperm(len(images), generator=generator)[:count].sort().values
    return batch_loader(images.subset(chosen), everything.num_workers, batch_size=datamodule.eval_batch_size)

"""What an objective may know of its place in the network. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from localfeat.backbones.layout import FeatureShape

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Site:
    """Where in the network a local objective sits, and what it needs to know of the rest.

    ``blocks`` and ``above`` are the backbone's own: what is built from them is to be copied or only read
    (:mod:`localfeat.methods.parts.above`), as no gradient may cross a cut.
    """

    index: int  # of the module, from 0
    modules: int  # K; the last one has the final classifier
    inputs: FeatureShape  # patch embeddings for module 0
    outputs: FeatureShape
    image_size: int
    num_classes: int
    mean: Sequence[float] = IMAGENET_MEAN  # of the normalisation that the images went through
    std: Sequence[float] = IMAGENET_STD
    loss_slices: int = 1  # slices of the batch in which the reconstruction loss is computed
    blocks: tuple[nn.Module, ...] = ()  # of the module itself
    above: tuple[nn.Module, ...] = ()  # the blocks after it
    shapes: tuple[FeatureShape, ...] = ()  # shapes[i] enters block i of the backbone, shapes[-1] the classifier
    tail: nn.Module | None = None  # the classifier
    observable: bool = True  # whether hooks on blocks see their graph: not if it is recomputed, sliced or compiled

    def interpolate(self, first: float, last: float) -> float:
        """A weight that goes linearly from the first local module to the last: i / (K - 2), and K=2 is the first."""
        local = self.modules - 1
        return first if local < 2 else first + (last - first) * self.index / (local - 1)

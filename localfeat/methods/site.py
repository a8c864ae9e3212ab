"""The place of an objective in the network. Nothing heavy is imported here."""

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
    """The place of a local objective, with everything it may know of the rest of the network.

    ``blocks`` and ``above`` are the backbone's own: copy them or only read them
    (:mod:`localfeat.methods.parts.above`), because no gradient may cross a cut.
    """

    index: int  # of the module, from 0
    modules: int  # K; the last one has the final classifier
    inputs: FeatureShape  # patch embeddings for module 0
    outputs: FeatureShape
    image_size: tuple[int, int]  # height and width in pixels
    num_classes: int
    in_chans: int = 3  # channels of the images
    mean: Sequence[float] = IMAGENET_MEAN  # of the normalisation that the images went through
    std: Sequence[float] = IMAGENET_STD
    loss_slices: int = 1  # slices of the batch in which the reconstruction loss is computed
    blocks: tuple[nn.Module, ...] = ()  # of the module itself
    above: tuple[nn.Module, ...] = ()  # the blocks after it
    shapes: tuple[FeatureShape, ...] = ()  # shapes[i] enters block i of the backbone, shapes[-1] the classifier
    tail: nn.Module | None = None  # the classifier
    observable: bool = True  # whether hooks on blocks see their graph: not if it is recomputed, sliced or compiled

    def interpolate(self, first: float, last: float) -> float:
        """Interpolate a weight linearly between first and last local module by i / (K - 2); K = 2 gives ``first``."""
        local = self.modules - 1
        return first if local < 2 else first + (last - first) * self.index / (local - 1)

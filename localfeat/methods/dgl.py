"""Decoupled greedy learning: cross entropy of a small convolutional network with batch statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from localfeat.methods.base import register
from localfeat.methods.site import Site
from localfeat.methods.supervised import Supervised

if TYPE_CHECKING:
    from localfeat.methods.objective import Objective


@register()
@dataclass(frozen=True)
class Dgl(Supervised):
    """``L = CE(MLP-SR(h), y)``: the features are pooled to a quarter of their sides before anything is computed.

    MLP-SR: adaptive mean pool to ⌈H/4⌉ x ⌈W/4⌉, three 1 x 1 convolutions without bias, mean pool to 2 x 2, three linear
    layers of 4 C outputs, all of these with BatchNorm and ReLU, then linear.

    Source: Belilovsky et al., *Decoupled Greedy Learning of CNNs* (ICML 2020).
    """

    name: str = "dgl"

    by_shapes: ClassVar[bool] = True

    @property
    def fewest_images(self) -> int:
        """Two: BatchNorm sees one value per image and channel."""
        return 2

    def supervise(self, site: Site) -> Objective:
        """Return the objective: MLP-SR on the module's output features."""
        from localfeat.methods.objective import HeadObjective
        from localfeat.methods.parts.heads import PooledMlp

        return HeadObjective(PooledMlp(site.outputs, site.num_classes), self.label_smoothing)

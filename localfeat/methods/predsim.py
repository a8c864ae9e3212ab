"""Cross entropy and the similarity of the images of a batch to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from localfeat.methods.base import register
from localfeat.methods.site import Site
from localfeat.methods.supervised import Supervised
from localfeat.utils.errors import UserError

if TYPE_CHECKING:
    from localfeat.methods.objective import Objective


@register()
@dataclass(frozen=True)
class PredSim(Supervised):
    """``L = (1 - β) · CE(W · mean_xy h + b, y) + β · MSE(S(conv(h)), S(onehot(y)))``.

    S is the matrix of cosines between images, described by their maps' standard deviations over space; W and b begin
    at 0. The last module's loss is the network's own cross entropy times 1 - β.

    Args:
        beta: β, the weight of the similarity.

    Source: Nøkland and Eidnes, *Training Neural Networks with Local Error Signals* (ICML 2019).
    """

    name: str = "predsim"
    beta: float = 0.99

    by_shapes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta < 1:
            raise UserError(f"method.beta={self.beta}: it lies in [0, 1)")

    @property
    def fewest_images(self) -> int:
        """Two: images are compared."""
        return 2

    def supervise(self, site: Site) -> Objective:
        """Return the objective: a linear classifier, and a convolution whose maps are compared."""
        from localfeat.methods.objectives.similarity import SimilarityObjective

        weights = {"cross_entropy": 1 - self.beta, "similarity": self.beta}
        return SimilarityObjective(site.outputs, site.num_classes, weights, self.label_smoothing)

    def build_last(self, site: Site) -> Objective:
        """Return the classifier's objective at 1 - β."""
        objective = super().build_last(site)
        objective.weights = {"cross_entropy": 1 - self.beta}
        return objective

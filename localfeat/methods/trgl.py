"""Cross entropy that moves features as little as it can: transport-regularised greedy learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from localfeat.methods.base import register
from localfeat.methods.site import Site
from localfeat.methods.supervised import Supervised
from localfeat.utils.errors import UserError

if TYPE_CHECKING:
    from localfeat.methods.objective import Objective


@register()
@dataclass(frozen=True)
class Trgl(Supervised):
    """``L = CE(W · mean_xy LN(h) + b, y) + 1 / (2 τ) · Σ_r mean(r²)``, r: every residual branch, after drop-path.

    The last module adds the sum to the loss of the network's own classifier.

    Args:
        tau: τ; the larger, the less the transport costs.
        vary: halve the weight of the sum in the second half of the modules.

    Source: Karkar et al., *Module-wise Training of Neural Networks via the Minimizing Movement Scheme* (NeurIPS 2023).
    """

    name: str = "trgl"
    tau: float = 10.0
    vary: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau <= 0:
            raise UserError(f"method.tau={self.tau}: it must be above 0")

    def supervise(self, site: Site) -> Objective:
        """Return the head's objective with the transport of the module's blocks."""
        from localfeat.methods.objective import HeadObjective
        from localfeat.methods.parts.heads import NormMeanLinear

        return self._moved(site, HeadObjective(NormMeanLinear(site.outputs, site.num_classes), self.label_smoothing))

    def build_last(self, site: Site) -> Objective:
        """Return the classifier's objective with the transport of the last blocks."""
        return self._moved(site, super().build_last(site))

    def _moved(self, site: Site, objective: Objective) -> Objective:
        from localfeat.methods.parts.watched import transport

        if (watched := transport(site, self.name)) is None:  # a sum over nothing
            return objective
        halved = self.vary and 2 * site.index >= site.modules
        objective.watched = watched
        objective.weights = {**objective.weights, "transport": (0.5 if halved else 1.0) / (2 * self.tau)}
        return objective

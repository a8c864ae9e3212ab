"""Train every local module by cross entropy at the lightest possible head."""

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
class GreedyLinear(Supervised):
    """``L = CE(W · mean_xy LN(h) + b, y)``: LayerNorm, mean over space, linear.

    Source: the "VanGL" baseline of Karkar et al., *Module-wise Training of Neural Networks via the Minimizing Movement
    Scheme* (NeurIPS 2023).
    """

    name: str = "greedy_linear"

    by_shapes: ClassVar[bool] = True

    def supervise(self, site: Site) -> Objective:
        """Return the objective: a head on the module's output features."""
        from localfeat.methods.objective import HeadObjective
        from localfeat.methods.parts.heads import NormMeanLinear

        return HeadObjective(NormMeanLinear(site.outputs, site.num_classes), self.label_smoothing)

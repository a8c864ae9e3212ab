"""Cross entropy after the next block, trained in a copy and averaged in another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from localfeat.methods.base import register
from localfeat.methods.site import Site
from localfeat.methods.supervised import Supervised
from localfeat.utils.errors import UserError

if TYPE_CHECKING:
    from localfeat.methods.objective import Objective


@dataclass(frozen=True)
class Man(Supervised):
    """``L = CE(head(s · B(h) + (2 - s) · E(h)), y)``: B a trained copy of the next module's first block, E its average.

    E follows the weights (and statistics) of that block, ``E ← m E + (1 - m) block``, after every optimizer step of the
    module, that is before the next module's. It is not trained.

    Args:
        momentum: m.
        learned: whether s is trained, from 1; otherwise it is 1 (``man``).

    Sources: Su et al., *Momentum Auxiliary Network for Supervised Local Learning* (ECCV 2024); its extension
    MAN++ (TPAMI 2026).
    """

    momentum: float = 0.995
    learned: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise UserError(f"method.momentum={self.momentum}: it lies in [0, 1)")

    def supervise(self, site: Site) -> Objective:
        """Return the objective: both blocks, then a head of LayerNorm, mean over space and linear."""
        from localfeat.methods.objectives.averaged import AveragedObjective
        from localfeat.methods.parts.heads import NormMeanLinear

        head = NormMeanLinear(site.shapes[len(site.shapes) - len(site.above)], site.num_classes)
        return AveragedObjective(site.above[0], head, self.momentum, self.learned, self.label_smoothing)


register()(Man("man"))
register()(Man("man_plus", learned=True))

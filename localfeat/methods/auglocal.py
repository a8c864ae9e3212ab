"""Cross entropy after copies of some of the network's own later blocks."""

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
class AugLocal(Supervised):
    """``L = CE(head(copies(h)), y)``: d of the L - 1 - l blocks after the module's last, block l, evenly picked.

    The i-th of them is block ``round(l + (L - l - 1) / d · i)``; what changes the shape between them is copied too.
    Copies are the module's own auxiliary parts and begin at the blocks' weights. Deeper modules have fewer:
    ``d_m = max(1, round(d (1 - τ r) + τ r))`` with ``r = m / (K - 2)`` for module m of K, from 0.

    Args:
        depth: d, the number of blocks that the first module copies.
        pyramid: τ, from 0 (the same depth everywhere) to 1 (one block at the last local module).

    Source: Ma et al., *Scaling Supervised Local Learning with Augmented Auxiliary Networks* (ICLR 2024).
    """

    name: str = "auglocal"
    depth: int = 2
    pyramid: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise UserError(f"method.depth={self.depth}: it must be at least 1")
        if not 0 <= self.pyramid <= 1:
            raise UserError(f"method.pyramid={self.pyramid}: it lies in [0, 1]")

    def supervise(self, site: Site) -> Objective:
        """Return the objective: the copies, then a head of LayerNorm, mean over space and linear."""
        from torch import nn

        from localfeat.methods.objective import HeadObjective
        from localfeat.methods.parts.above import ahead, copied
        from localfeat.methods.parts.heads import NormMeanLinear

        copies = [copied(block) for block in ahead(site, self.depth_at(site.index, site.modules))]
        head = NormMeanLinear(site.shapes[-1], site.num_classes)
        return HeadObjective(nn.Sequential(*copies, head), self.label_smoothing)

    def depth_at(self, index: int, modules: int) -> int:
        """Return how many blocks module ``index`` of ``modules`` copies."""
        ratio = index / (modules - 2) if modules > 2 else 0.0
        return max(1, round(self.depth * (1 - self.pyramid * ratio) + self.pyramid * ratio))

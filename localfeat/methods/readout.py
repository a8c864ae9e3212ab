"""Cross entropy at the classifier of the network itself, after copies of later blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from localfeat.methods.base import Method, register
from localfeat.methods.site import Site
from localfeat.utils.errors import UserError

if TYPE_CHECKING:
    from localfeat.methods.objective import Objective
    from localfeat.methods.parts.decoders import DecoderFactory


@register()
@dataclass(frozen=True)
class Readout(Method):
    """``L = CE(tail(copies(h)), y)``: d copied blocks of those above, evenly picked, then the classifier, read only.

    The classifier is the last module's as it is at every step: no gradient reaches it. Copies are trained and begin
    at the blocks' weights; what changes the shape between them is copied, too.

    Args:
        depth: d, the number of copied blocks.

    Source: after SOLO (2026).
    """

    name: str = "readout"
    depth: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise UserError(f"method.depth={self.depth}: it must be at least 1")

    def build(self, site: Site, decoder: DecoderFactory) -> Objective:
        """Return the objective: the copies, then the classifier."""
        from torch import nn

        from localfeat.methods.objective import HeadObjective
        from localfeat.methods.parts.above import ReadOnly, ahead, copied

        assert site.tail is not None
        copies = [copied(block) for block in ahead(site, self.depth)]
        return HeadObjective(nn.Sequential(*copies, ReadOnly(site.tail)), self.label_smoothing)

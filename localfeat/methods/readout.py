"""Cross entropy at the classifier of the network itself, after later blocks or copies of them."""

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
class Readout(Supervised):
    """``L = CE(tail(blocks(h)), y)``: d of the blocks above, evenly picked, then the classifier, read only.

    The classifier is the last module's as it is at every step: no gradient reaches it. What changes the shape between
    the picked blocks belongs to them.

    Args:
        depth: d, the number of blocks.
        copies: ``True`` (``readout``): the module trains copies of the blocks, which begin at their weights. ``False``
            (``lookahead``): they are the network's own as they are at every step, read only, and the module has no
            parameters beside its blocks.

    Sources: after SOLO (2026); ``lookahead`` is localfeat's.
    """

    depth: int = 1
    copies: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise UserError(f"method.depth={self.depth}: it must be at least 1")

    def supervise(self, site: Site) -> Objective:
        """Return the objective: the blocks, then the classifier."""
        from torch import nn

        from localfeat.methods.objective import HeadObjective
        from localfeat.methods.parts.above import ReadOnly, ahead, copied

        assert site.tail is not None
        blocks = [copied(block) if self.copies else ReadOnly(block) for block in ahead(site, self.depth)]
        return HeadObjective(nn.Sequential(*blocks, ReadOnly(site.tail)), self.label_smoothing)


register()(Readout("readout"))
register()(Readout("lookahead", copies=False))

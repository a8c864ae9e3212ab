"""Cross entropy at the classifier of the network itself, after later blocks as they are: nothing is added."""

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
class Lookahead(Method):
    """``L = CE(tail(blocks(h)), y)``: d of the blocks above, evenly picked, and the classifier, all read only.

    They are the network's own as they are at every step; their gradients reach the module's features only. A module
    has no parameters beside its blocks. What changes the shape between the picked blocks is read, too.

    Args:
        depth: d, the number of blocks that are read.

    Source: localfeat.
    """

    name: str = "lookahead"
    depth: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise UserError(f"method.depth={self.depth}: it must be at least 1")

    def build(self, site: Site, decoder: DecoderFactory) -> Objective:
        """Return the objective: the blocks, then the classifier."""
        from torch import nn

        from localfeat.methods.objective import HeadObjective
        from localfeat.methods.parts.above import ReadOnly, ahead

        assert site.tail is not None
        read = [ReadOnly(module) for module in (*ahead(site, self.depth), site.tail)]
        return HeadObjective(nn.Sequential(*read), self.label_smoothing)

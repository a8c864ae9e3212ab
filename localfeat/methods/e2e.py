"""End-to-end training: the network is one module, trained by its classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from localfeat.methods.base import Method, register
from localfeat.methods.site import Site
from localfeat.utils.errors import UserError

if TYPE_CHECKING:
    from localfeat.methods.objective import Objective
    from localfeat.methods.parts.decoders import DecoderFactory


@register(colour="#57606a", order=0)
@dataclass(frozen=True)
class EndToEnd(Method):
    """``L = CE(network(x), y)``."""

    name: str = "e2e"
    detach: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.detach:
            raise UserError("method.detach=true: end-to-end training has no cuts; a greedy method (greedy_linear) has")

    @property
    def joint(self) -> bool:
        """No: there are no local losses."""
        return False

    def build(self, site: Site, decoder: DecoderFactory) -> Objective:
        """Never called: there is one module, the last."""
        raise NotImplementedError

    def build_whole(self, sites: Sequence[Site], decoder: DecoderFactory) -> Objective:
        """Return the classifier's objective."""
        return self.build_last(sites[-1])

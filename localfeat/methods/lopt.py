"""Reconstruct what the module was given, from what it makes of it: no task loss, for pretrained networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from localfeat.methods.base import Method, register
from localfeat.methods.site import Site
from localfeat.utils.errors import UserError

if TYPE_CHECKING:
    from localfeat.methods.objective import Objective
    from localfeat.methods.parts.decoders import DecoderFactory


@register()
@dataclass(frozen=True)
class Lopt(Method):
    """``L = λ · MSE(decode(h), z)``, z: the module's input features, detached; the last module learns the task.

    ``decode``: LayerNorm, linear to a quarter of the channels, GELU, linear; where the module has
    made maps smaller, every pixel becomes a square of pixels. For pretrained networks: from scratch, features that
    are not normalised drift.

    Args:
        weight: λ.

    Source: LOPT (2026).
    """

    name: str = "lopt"
    weight: float = 10.0

    by_shapes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight <= 0:
            raise UserError(f"method.weight={self.weight}: it must be above 0")

    def build(self, site: Site, decoder: DecoderFactory) -> Objective:
        """Return the objective: the decoder and the error of its output."""
        from localfeat.methods.objectives.bottleneck import InputObjective

        return InputObjective(site.outputs, site.inputs, self.weight)

"""Base classes of methods that supervise a head at every local module and, on choice, reconstruct a target."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from localfeat.methods.base import Method, one_of
from localfeat.methods.site import Site
from localfeat.utils.errors import UserError

if TYPE_CHECKING:
    from localfeat.methods.objective import Objective
    from localfeat.methods.objectives.reconstruction import Decoding
    from localfeat.methods.parts.decoders import DecoderFactory

LOSSES = ("bce", "mse", "smooth_l1", "cosine")


@dataclass(frozen=True)
class WithDecoder(Method):
    """``L = γ · L_head + λ · L_reconstruction`` at every local module.

    Args:
        reconstruct: the target of a decoder beside the head: ``image``, ``features`` (the module's input) or nothing.
        reconstruction_loss: ``bce`` (against the sigmoid of the normalised target), ``mse``, ``smooth_l1``, ``cosine``.
        reconstruction_weight: λ at the first and the last local module, linear between.
        supervision_weight: γ at the first and the last local module, a factor of all terms of the head's objective.
        width: channels of the auxiliary block that the decoder reads.
        kernel: side of that block's convolution, odd.
    """

    reconstruct: str | None = None
    reconstruction_loss: str = "mse"
    reconstruction_weight: Sequence[float] = (3.0, 1.0)
    supervision_weight: Sequence[float] = (1.0, 1.0)
    width: int = 128
    kernel: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("method.reconstruct", self.reconstruct, (None, "image", "features"))
        one_of("method.reconstruction_loss", self.reconstruction_loss, LOSSES)
        for key in ("reconstruction_weight", "supervision_weight"):
            pair = getattr(self, key)
            if len(pair) != 2 or min(pair) < 0:
                raise UserError(f"method.{key}={list(pair)}: two weights ≥ 0, at the first and the last local module")
        if self.width <= 0:
            raise UserError(f"method.width={self.width}: it must be above 0")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"method.kernel={self.kernel}: it must be odd and above 0")

    @property
    def decodes(self) -> bool:
        """Whether the method reconstructs a target."""
        return self.reconstruct is not None

    def decoding(self, site: Site, factory: DecoderFactory) -> Decoding | None:
        """Return the decoder from auxiliary features to the target, and the target; ``None`` without one."""
        from localfeat.methods.objectives.reconstruction import Decoding
        from localfeat.methods.parts.decoders import build_decoder
        from localfeat.methods.parts.targets import FeatureTarget, ImageTarget

        source, inputs, bounded = site.outputs, site.inputs, self.reconstruction_loss == "bce"
        target: FeatureTarget | ImageTarget
        if self.reconstruct == "features":
            target, channels, size = FeatureTarget(inputs, bounded), inputs.channels, (inputs.height, inputs.width)
        elif self.reconstruct == "image":
            target, channels, size = ImageTarget(bounded, site.mean, site.std), site.in_chans, site.image_size
        else:
            return None
        decoder = build_decoder(factory, self.width, channels, (source.height, source.width), size)
        return Decoding(decoder, target, self.reconstruction_loss)


@dataclass(frozen=True)
class Supervised(WithDecoder):
    """Any objective of a head, given by :meth:`supervise`; the decoder has an auxiliary block of its own."""

    @abstractmethod
    def supervise(self, site: Site) -> Objective:
        """Return the objective of the head of the local module at ``site``, which is not the last."""

    def build(self, site: Site, decoder: DecoderFactory) -> Objective:
        """Return the head's objective, with a decoder beside it if the method reconstructs."""
        from localfeat.methods.objectives.reconstruction import ObjectiveWithDecoder
        from localfeat.methods.parts.heads import AuxiliaryBlock

        objective = self.supervise(site)
        factor = site.interpolate(*self.supervision_weight)
        objective.weights = {term: factor * weight for term, weight in objective.weights.items()}
        if (decoding := self.decoding(site, decoder)) is None:
            return objective
        weight = site.interpolate(*self.reconstruction_weight)
        return ObjectiveWithDecoder(
            AuxiliaryBlock(site.outputs, self.width, self.kernel), objective, decoding, site.loss_slices, weight
        )

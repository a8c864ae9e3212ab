"""The paper's method, its baselines and end-to-end training: a supervised head and an optional decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from localfeat.methods.base import Method, one_of, register
from localfeat.methods.site import Site
from localfeat.utils.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from localfeat.methods.objective import Objective
    from localfeat.methods.parts.decoders import DecoderFactory
    from localfeat.methods.parts.targets import FeatureTarget, ImageTarget

LOSSES = ("bce", "mse", "smooth_l1", "cosine")


@dataclass(frozen=True)
class HeadAndDecoder(Method):
    """An auxiliary block with a supervised head, and a decoder that reconstructs a target (SPEC: L_i).

    Args:
        local: ``False`` trains the whole network as one module (end to end).
        supervision: ``contrast`` (supervised NT-Xent) or ``cross_entropy``.
        target: the reconstruction target: ``image``, ``features`` (the module's input) or nothing.
        reconstruction_loss: ``bce`` (against the sigmoid of the normalised target), ``mse``, ``smooth_l1``, ``cosine``.
        reconstruction_weight: lambda at the first and the last local module, linear between.
        supervision_weight: gamma at the first and the last local module.
        temperature: temperature of the contrastive loss.
        width: channels of the auxiliary block.
        projection_dim: length of the embeddings under ``contrast``.
    """

    local: bool = True
    supervision: str = "contrast"
    target: str | None = None
    reconstruction_loss: str = "bce"
    reconstruction_weight: Sequence[float] = (3.0, 1.0)
    supervision_weight: Sequence[float] = (1.0, 3.0)
    temperature: float = 0.1
    width: int = 128
    projection_dim: int = 128

    by_shapes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("method.supervision", self.supervision, ("contrast", "cross_entropy"))
        one_of("method.target", self.target, (None, "image", "features"))
        one_of("method.reconstruction_loss", self.reconstruction_loss, LOSSES)
        for key in ("reconstruction_weight", "supervision_weight"):
            pair = getattr(self, key)
            if len(pair) != 2 or min(pair) < 0:
                raise UserError(f"method.{key}={list(pair)}: two weights ≥ 0, at the first and the last local module")
        for key in ("temperature", "width", "projection_dim"):
            if getattr(self, key) <= 0:
                raise UserError(f"method.{key}={getattr(self, key)}: it must be above 0")

    @property
    def contrasts(self) -> bool:
        """Whether some module needs one class per image (no mixup, no cutmix) and more than one image."""
        return self.local and self.supervision == "contrast"

    @property
    def decodes(self) -> bool:
        """Whether the method reconstructs a target."""
        return self.target is not None

    def build(self, site: Site, decoder: DecoderFactory) -> Objective:
        """Return the objective of the local module at ``site``."""
        from localfeat.methods.objective import LocalObjective
        from localfeat.methods.parts.heads import AuxiliaryBlock, PooledHead

        contrast = self.supervision == "contrast"
        weights = {self.supervision: site.interpolate(*self.supervision_weight)}
        if self.target is not None:
            weights["reconstruction"] = site.interpolate(*self.reconstruction_weight)
        return LocalObjective(
            auxiliary=AuxiliaryBlock(site.outputs, self.width),
            head=PooledHead(self.width, self.projection_dim if contrast else site.num_classes),
            supervision=self.supervision,
            decoder=self._decoder(site, decoder),
            target=self._target(site),
            reconstruction_loss=self.reconstruction_loss,
            weights=weights,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            loss_slices=site.loss_slices,
        )

    def _decoder(self, site: Site, factory: DecoderFactory) -> nn.Module | None:
        """Return the decoder from the auxiliary features to the target."""
        from localfeat.methods.parts.decoders import build_decoder

        if self.target is None:
            return None
        source, inputs = site.outputs, site.inputs
        channels, size = inputs.channels, (inputs.height, inputs.width)
        if self.target == "image":
            channels, size = site.in_chans, site.image_size
        return build_decoder(factory, self.width, channels, (source.height, source.width), size)

    def _target(self, site: Site) -> FeatureTarget | ImageTarget | None:
        from localfeat.methods.parts.targets import FeatureTarget, ImageTarget

        bounded = self.reconstruction_loss == "bce"
        if self.target == "features":
            return FeatureTarget(site.inputs, bounded)
        return ImageTarget(bounded, site.mean, site.std) if self.target == "image" else None


_COLOURED = (
    (HeadAndDecoder("e2e", local=False, supervision="cross_entropy"), "#57606a"),
    (HeadAndDecoder("greedy_ce", supervision="cross_entropy", supervision_weight=(1.0, 1.0)), "#0b6bcb"),
    (HeadAndDecoder("greedy_contrast", supervision_weight=(1.0, 1.0)), "#0f8a6c"),
    (HeadAndDecoder("image_recon", target="image"), "#d9730d"),
    (HeadAndDecoder("feature_recon", target="features"), "#8a3ffc"),
)

for _order, (_method, _colour) in enumerate(_COLOURED):
    register(colour=_colour, order=_order)(_method)
for _name, _target in (("feature_recon_ce", "features"), ("image_recon_ce", "image")):  # ours: experiments/small
    register()(HeadAndDecoder(_name, supervision="cross_entropy", target=_target, reconstruction_loss="mse"))

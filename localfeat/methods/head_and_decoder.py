"""The paper's method and its baselines: a supervised head and an optional decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from localfeat.methods.base import one_of, register
from localfeat.methods.site import Site
from localfeat.methods.supervised import WithDecoder
from localfeat.utils.errors import UserError

if TYPE_CHECKING:
    from localfeat.methods.objective import Objective
    from localfeat.methods.parts.decoders import DecoderFactory


@dataclass(frozen=True)
class HeadAndDecoder(WithDecoder):
    """An auxiliary block with a supervised head, and a decoder that reconstructs a target (SPEC: L_i).

    Args:
        supervision: ``contrast`` (supervised NT-Xent) or ``cross_entropy``.
        temperature: temperature of the contrastive loss.
        projection_dim: length of the embeddings under ``contrast``.
    """

    reconstruction_loss: str = "bce"
    supervision_weight: Sequence[float] = (1.0, 3.0)
    supervision: str = "contrast"
    temperature: float = 0.1
    projection_dim: int = 128

    by_shapes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("method.supervision", self.supervision, ("contrast", "cross_entropy"))
        for key in ("temperature", "projection_dim"):
            if getattr(self, key) <= 0:
                raise UserError(f"method.{key}={getattr(self, key)}: it must be above 0")

    @property
    def contrasts(self) -> bool:
        """Whether some module needs one class per image (no mixup, no cutmix) and more than one image."""
        return self.supervision == "contrast"

    def build(self, site: Site, decoder: DecoderFactory) -> Objective:
        """Return the objective of the local module at ``site``: head and decoder read one auxiliary block."""
        from torch import nn

        from localfeat.methods.objectives.reconstruction import LocalObjective
        from localfeat.methods.parts.heads import AuxiliaryBlock

        weights = {self.supervision: site.interpolate(*self.supervision_weight)}
        if self.decodes:
            weights["reconstruction"] = site.interpolate(*self.reconstruction_weight)
        outputs = self.projection_dim if self.supervision == "contrast" else site.num_classes
        return LocalObjective(
            auxiliary=AuxiliaryBlock(site.outputs, self.width, self.kernel),
            head=nn.Sequential(nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, outputs)),
            decoding=self.decoding(site, decoder),
            loss_slices=site.loss_slices,
            supervision=self.supervision,
            weights=weights,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
        )


_COLOURED = (
    (HeadAndDecoder("greedy_ce", supervision="cross_entropy", supervision_weight=(1.0, 1.0)), "#0b6bcb"),
    (HeadAndDecoder("greedy_contrast", supervision_weight=(1.0, 1.0)), "#0f8a6c"),
    (HeadAndDecoder("image_recon", reconstruct="image"), "#d9730d"),
    (HeadAndDecoder("feature_recon", reconstruct="features"), "#8a3ffc"),
)

for _order, (_method, _colour) in enumerate(_COLOURED, start=1):
    register(colour=_colour, order=_order)(_method)
for _name, _target, _detach in (  # ours: experiments/small
    ("feature_recon_ce", "features", True),
    ("image_recon_ce", "image", True),
    ("deep_supervision", "features", False),  # the control of feature_recon_ce
):
    register()(
        HeadAndDecoder(
            _name, detach=_detach, supervision="cross_entropy", reconstruct=_target, reconstruction_loss="mse"
        )
    )

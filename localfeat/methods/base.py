"""A method chooses the objectives; the training loop is the same for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from timm.data.constants import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data.constants import IMAGENET_DEFAULT_STD as IMAGENET_STD

from localfeat.backbones.layout import FeatureShape
from localfeat.methods.objective import LocalObjective, Objective
from localfeat.methods.parts.decoders import DecoderFactory, upscale_factor
from localfeat.methods.parts.heads import AuxiliaryBlock, PooledHead
from localfeat.methods.parts.losses import RECONSTRUCTION_LOSSES
from localfeat.methods.parts.targets import FeatureTarget, ImageTarget
from localfeat.utils.errors import UserError


def _one_of(key: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise UserError(f"{key}={value}: it is one of {', '.join(str(k) for k in known)}")


@dataclass(frozen=True)
class Site:
    """Where in the network a local objective sits, and what it needs to know of the rest."""

    index: int  # of the module, from 0
    modules: int  # K; the last one has the final classifier and no local objective
    inputs: FeatureShape  # patch embeddings for module 0
    outputs: FeatureShape
    image_size: int
    num_classes: int
    mean: Sequence[float] = IMAGENET_MEAN  # of the normalisation that the images went through
    std: Sequence[float] = IMAGENET_STD
    loss_slices: int = 1  # slices of the batch in which the reconstruction loss is computed

    def interpolate(self, first: float, last: float) -> float:
        """A weight that goes linearly from the first local module to the last: i / (K - 2), and K=2 is the first."""
        local = self.modules - 1
        return first if local < 2 else first + (last - first) * self.index / (local - 1)


@dataclass(frozen=True)
class Method:
    """Which objective every local module but the last gets.

    A new method is a subclass with its own :meth:`build`, or other values here.

    Args:
        name: appears in results.
        local: ``False`` trains the whole network as one module (end to end).
        supervision: ``contrast`` (supervised NT-Xent) or ``cross_entropy``.
        target: what is reconstructed: ``image``, ``features`` (the module's input) or nothing.
        reconstruction_loss: ``bce`` (against the sigmoid of the normalised target), ``mse``, ``smooth_l1``, ``cosine``.
        reconstruction_weight: lambda at the first and the last local module, linear between.
        supervision_weight: gamma at the first and the last local module.
        temperature: of the contrastive loss.
        width: channels of the auxiliary block.
        projection_dim: length of the embeddings under ``contrast``.
        label_smoothing: of every cross entropy, the final classifier's too.
    """

    name: str
    local: bool = True
    supervision: str = "contrast"
    target: str | None = None
    reconstruction_loss: str = "bce"
    reconstruction_weight: Sequence[float] = (3.0, 1.0)
    supervision_weight: Sequence[float] = (1.0, 3.0)
    temperature: float = 0.1
    width: int = 128
    projection_dim: int = 128
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        _one_of("method.supervision", self.supervision, ("contrast", "cross_entropy"))
        _one_of("method.target", self.target, (None, "image", "features"))
        _one_of("method.reconstruction_loss", self.reconstruction_loss, tuple(RECONSTRUCTION_LOSSES))
        for key in ("reconstruction_weight", "supervision_weight"):
            pair = getattr(self, key)
            if len(pair) != 2 or min(pair) < 0:
                raise UserError(f"method.{key}={list(pair)}: two weights ≥ 0, at the first and the last local module")
        for key in ("temperature", "width", "projection_dim"):
            if getattr(self, key) <= 0:
                raise UserError(f"method.{key}={getattr(self, key)}: it must be above 0")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"method.label_smoothing={self.label_smoothing}: it lies in [0, 1)")

    @property
    def contrasts(self) -> bool:
        """Whether some module needs one class per image (no mixup, no cutmix) and more than one image."""
        return self.local and self.supervision == "contrast"

    def build(self, site: Site, decoder: DecoderFactory) -> Objective:
        """The objective of the local module at ``site``."""
        contrast = self.supervision == "contrast"
        weights = {self.supervision: site.interpolate(*self.supervision_weight)}
        if self.target is not None:
            weights["reconstruction"] = site.interpolate(*self.reconstruction_weight)
        return LocalObjective(
            auxiliary=AuxiliaryBlock(site.outputs, self.width),
            head=PooledHead(self.width, self.projection_dim if contrast else site.num_classes),
            supervision=self.supervision,
            decoder=None if self.target is None else decoder(self.width, *self._decoded(site)),
            target=self._target(site),
            reconstruction_loss=self.reconstruction_loss,
            weights=weights,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            loss_slices=site.loss_slices,
        )

    def _decoded(self, site: Site) -> tuple[int, int]:
        """Channels of the target and how many times larger than the auxiliary features it is."""
        source = (site.outputs.height, site.outputs.width)
        if self.target == "image":
            return 3, upscale_factor(source, (site.image_size, site.image_size))
        return site.inputs.channels, upscale_factor(source, (site.inputs.height, site.inputs.width))

    def _target(self, site: Site) -> FeatureTarget | ImageTarget | None:
        bounded = self.reconstruction_loss == "bce"
        if self.target == "features":
            return FeatureTarget(site.inputs, bounded)
        return ImageTarget(bounded, site.mean, site.std) if self.target == "image" else None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("e2e", local=False, supervision="cross_entropy"),
        Method("greedy_ce", supervision="cross_entropy", supervision_weight=(1.0, 1.0)),
        Method("greedy_contrast", supervision_weight=(1.0, 1.0)),
        Method("image_recon", target="image"),
        Method("feature_recon", target="features"),
    )
}


def as_method(method: str | Method, **changes: object) -> Method:
    """A method from its name (see ``METHODS``), with some fields changed; a :class:`Method` is taken as it is."""
    if isinstance(method, str):
        _one_of("method", method, tuple(METHODS))
        method = METHODS[method]
    return dataclasses.replace(method, **changes)  # type: ignore[arg-type]

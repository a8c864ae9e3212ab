"""Objectives: cross entropy of the final classifier, or supervision and reconstruction at earlier modules."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localfeat.efficiency.autocast import AutocastState, without_autocast
from localfeat.efficiency.loss_slices import LossOf, pooled_and_loss, refuse_batch_statistics
from localfeat.methods.parts.heads import AuxiliaryBlock, PooledHead
from localfeat.methods.parts.losses import RECONSTRUCTION_LOSSES, supervised_nt_xent
from localfeat.methods.parts.targets import FeatureTarget, ImageTarget
from localfeat.methods.parts.watched import Watched
from localfeat.utils.errors import UserError

Terms = dict[str, Tensor]

IMAGES_PER_SLICE = 4
"""Smallest number of images computed at once: smaller slices save little memory and cost much time."""


class Reconstruction(NamedTuple):
    """A decoder's output beside its target, in one range: pixels in [0, 1] for images."""

    module: int  # counted from 1
    kind: str  # "image" or "features"
    target: Tensor  # (B, C, H, W)
    output: Tensor  # (B, C, H, W)


class Objective(nn.Module):
    """``(inputs, outputs, images, labels) -> (terms, logits)``.

    ``inputs`` are the module's input features (detached), ``outputs`` its output features, both in the backbone's
    layout (``site.inputs.to_nchw`` and ``site.outputs.to_nchw`` make (B, C, H, W) of them); ``images`` the normalised
    images (B, C, H, W), ``None`` once no objective needs them; ``labels`` (B,) class indices, or (B, num_classes)
    probabilities under mixup. ``terms`` are unweighted scalars; ``weights`` has a factor for each. ``logits`` come
    from the final classifier only.

    Parts without ``requires_grad`` are kept: they are in checkpoints, not in the optimizer, and never in the backbone.
    """

    weights: dict[str, float]
    watched: Watched | None = None  # makes a term from outputs of blocks; ``weights`` has its factor
    uses_images: bool = False  # whether the images must be kept until this module has run

    def reconstruct(self, inputs: Tensor, outputs: Tensor, images: Tensor, module: int) -> Reconstruction | None:
        """Return output and target of the decoder for inspection; ``None`` without a decoder."""
        return None

    def watch(self) -> AbstractContextManager[None]:
        """Return a context that watches the body while it runs, in every training batch."""
        return nullcontext() if self.watched is None else self.watched.watch()

    def watched_terms(self) -> Terms:
        """Return the watched term, and drop it: it holds a graph."""
        return {} if self.watched is None else {self.watched.term: torch.stack(self.watched.take()).sum()}

    def after_step(self) -> None:
        """Update state that follows the weights; called after every optimizer step of this module."""


class HeadObjective(Objective):
    """Cross entropy of a head's logits.

    Args:
        head: output features in the backbone's layout -> logits (B, num_classes).
        label_smoothing: of the cross entropy.
    """

    def __init__(self, head: nn.Module, label_smoothing: float) -> None:
        super().__init__()
        self.head = head
        self.label_smoothing = label_smoothing
        self.weights = {"cross_entropy": 1.0}

    def forward(
        self, inputs: Tensor, outputs: Tensor, images: Tensor | None, labels: Tensor
    ) -> tuple[Terms, Tensor | None]:
        return {"cross_entropy": cross_entropy(self.head(outputs), labels, self.label_smoothing)}, None


class ClassifierObjective(Objective):
    """Cross entropy at the backbone's own classifier: the last module's objective, and the only one of ``e2e``."""

    def __init__(self, tail: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.tail = tail
        self.label_smoothing = label_smoothing
        self.weights = {"cross_entropy": 1.0}

    def forward(
        self, inputs: Tensor, outputs: Tensor, images: Tensor | None, labels: Tensor
    ) -> tuple[Terms, Tensor | None]:
        logits = self.tail(outputs)
        return {"cross_entropy": cross_entropy(logits, labels, self.label_smoothing)}, logits


class LocalObjective(Objective):
    """Auxiliary block with two branches: a pooled head under supervision, and a decoder (SPEC, L_i).

    Args:
        auxiliary: reads the module's output features.
        head: pooled embeddings (``contrast``) or class logits (``cross_entropy``).
        supervision: the term that trains the head.
        decoder: auxiliary features -> the target's shape; ``None`` for methods that do not reconstruct.
        target: the decoder's target.
        reconstruction_loss: ``bce``, ``mse``, ``smooth_l1`` or ``cosine``.
        weights: factors of ``contrast`` or ``cross_entropy``, and of ``reconstruction``.
        temperature: temperature of the contrastive loss.
        label_smoothing: label smoothing of the cross entropy.
        loss_slices: slices of the batch in which, in training, auxiliary features are computed and what depends on
            them, the reconstruction loss with its gradient, so that they never exist as a whole. Not under float16,
            where the gradient of a loss that no GradScaler has scaled yet would underflow.

    Raises:
        UserError: slices with a decoder that depends on the whole batch.
    """

    def __init__(
        self,
        auxiliary: AuxiliaryBlock,
        head: PooledHead,
        supervision: str,
        decoder: nn.Module | None,
        target: FeatureTarget | ImageTarget | None,
        reconstruction_loss: str,
        weights: dict[str, float],
        temperature: float,
        label_smoothing: float,
        loss_slices: int = 1,
    ) -> None:
        super().__init__()
        if loss_slices > 1 and decoder is not None:
            refuse_batch_statistics(decoder, loss_slices)
        self.loss_slices = loss_slices
        self.auxiliary = auxiliary
        self.head = head
        self.supervision = supervision
        self.decoder = decoder
        self.target = target
        self.reconstruction_loss = RECONSTRUCTION_LOSSES[reconstruction_loss]
        self.weights = weights
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.uses_images = isinstance(target, ImageTarget)

    def forward(
        self, inputs: Tensor, outputs: Tensor, images: Tensor | None, labels: Tensor
    ) -> tuple[Terms, Tensor | None]:
        loss_of = self._reconstruction(inputs, images)
        if self.loss_slices > 1 and self.training and torch.is_grad_enabled() and not _in_float16(outputs):
            parameters = () if self.decoder is None else self.decoder.parameters()
            pooled, loss = pooled_and_loss(
                self.auxiliary.convolve(outputs), loss_of, parameters, self._slices(len(outputs))
            )
            terms = {self.supervision: self._supervise(self.head.project(pooled), labels)}
            return terms if loss is None else {**terms, "reconstruction": loss}, None
        maps = self.auxiliary(outputs)  # (B, width, h, w)
        terms = {self.supervision: self._supervise(self.head(maps), labels)}
        if loss_of is not None:
            terms["reconstruction"] = loss_of(maps, slice(None))
        return terms, None

    def _reconstruction(self, inputs: Tensor, images: Tensor | None) -> LossOf | None:
        """Return the loss function of a slice of the batch; ``None`` without a decoder."""
        decoder, target = self.decoder, self.target
        if decoder is None or target is None:
            return None

        def loss_of(maps: Tensor, part: slice) -> Tensor:
            prediction = decoder(maps).float()  # not kept in the decoder's own dtype beside it
            wanted = target(inputs[part], None if images is None else images[part])
            with without_autocast(maps.device):
                return self.reconstruction_loss(prediction, wanted)

        return loss_of

    def _slices(self, images: int) -> int:
        return max(1, min(self.loss_slices, images // IMAGES_PER_SLICE))

    def _supervise(self, head: Tensor, labels: Tensor) -> Tensor:
        if self.supervision == "cross_entropy":
            return cross_entropy(head, labels, self.label_smoothing)
        if labels.is_floating_point():
            raise UserError("the contrastive loss needs one class per image: switch mixup and cutmix off")
        with without_autocast(head.device):
            return supervised_nt_xent(head.float(), labels, self.temperature)

    def reconstruct(self, inputs: Tensor, outputs: Tensor, images: Tensor, module: int) -> Reconstruction | None:
        """See :meth:`Objective.reconstruct`."""
        if self.decoder is None or self.target is None:
            return None
        output = self.target.activate(self.decoder(self.auxiliary(outputs)).float())
        target = self.target(inputs, images)
        if isinstance(self.target, ImageTarget):
            output, target = self.target.as_pixels(output), self.target.as_pixels(target)
        return Reconstruction(module, self.target.kind, target, output)


def _in_float16(features: Tensor) -> bool:
    """Tell whether convolutions of these features compute in float16."""
    autocast = AutocastState.of(features.device)
    return (autocast.dtype if autocast.enabled else features.dtype) == torch.float16


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Return the cross entropy of logits (B, classes), in float32; labels are indices (B,) or probabilities."""
    with without_autocast(logits.device):
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)

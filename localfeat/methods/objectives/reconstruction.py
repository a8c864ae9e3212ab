"""A decoder beside a head: the head reads the decoder's auxiliary features, or whatever it likes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from localfeat.efficiency.autocast import AutocastState, without_autocast
from localfeat.efficiency.loss_slices import LossOf, pooled_and_loss, refuse_batch_statistics
from localfeat.methods.objective import Objective, Reconstruction, Terms, cross_entropy
from localfeat.methods.parts.heads import AuxiliaryBlock
from localfeat.methods.parts.losses import RECONSTRUCTION_LOSSES, supervised_nt_xent
from localfeat.methods.parts.targets import FeatureTarget, ImageTarget
from localfeat.utils.errors import UserError

IMAGES_PER_SLICE = 4
"""Smallest number of images computed at once: smaller slices save little memory and cost much time."""


class Decoding(NamedTuple):
    """What becomes of the auxiliary features."""

    decoder: nn.Module  # auxiliary features -> the target's shape
    target: FeatureTarget | ImageTarget
    loss: str  # bce, mse, smooth_l1 or cosine


class AuxiliaryObjective(Objective):
    """An auxiliary block with a decoder, and a head.

    Args:
        auxiliary: reads the module's output features.
        head: what is supervised.
        decoding: the decoder and its target; ``None`` for methods that do not reconstruct.
        loss_slices: slices of the batch in which, in training, auxiliary features are computed and what depends on
            them, the reconstruction loss with its gradient, so that they never exist as a whole. Not under float16,
            where the gradient of a loss that no GradScaler has scaled yet would underflow.

    Raises:
        UserError: slices with a decoder that depends on the whole batch.
    """

    def __init__(
        self, auxiliary: AuxiliaryBlock, head: nn.Module, decoding: Decoding | None, loss_slices: int = 1
    ) -> None:
        super().__init__()
        if loss_slices > 1 and decoding is not None:
            refuse_batch_statistics(decoding.decoder, loss_slices)
        self.loss_slices = loss_slices
        self.auxiliary = auxiliary
        self.head = head
        self.decoder = None if decoding is None else decoding.decoder
        self.target = None if decoding is None else decoding.target
        self.reconstruction_loss = RECONSTRUCTION_LOSSES["mse" if decoding is None else decoding.loss]
        self.uses_images = isinstance(self.target, ImageTarget)

    def branches(self, inputs: Tensor, outputs: Tensor, images: Tensor | None) -> tuple[Tensor, Terms]:
        """Return the auxiliary features averaged over space (B, width), and the reconstruction's term if there is one.

        Arguments as :class:`localfeat.Objective` has them.
        """
        loss_of = self._reconstruction(inputs, images)
        if self.loss_slices > 1 and self.training and torch.is_grad_enabled() and not _in_float16(outputs):
            parameters = () if self.decoder is None else self.decoder.parameters()
            hidden = self.auxiliary.convolve(outputs)
            pooled, loss = pooled_and_loss(hidden, loss_of, parameters, self._slices(len(outputs)))
        else:
            maps = self.auxiliary(outputs)  # (B, width, h, w)
            pooled = maps.mean((2, 3))
            loss = None if loss_of is None else loss_of(maps, slice(None))
        return pooled, {} if loss is None else {"reconstruction": loss}

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

    def reconstruct(self, inputs: Tensor, outputs: Tensor, images: Tensor, module: int) -> Reconstruction | None:
        """See :meth:`Objective.reconstruct`."""
        if self.decoder is None or self.target is None:
            return None
        output = self.target.activate(self.decoder(self.auxiliary(outputs)).float())
        target = self.target(inputs, images)
        if isinstance(self.target, ImageTarget):
            output, target = self.target.as_pixels(output), self.target.as_pixels(target)
        return Reconstruction(module, self.target.kind, target, output)


class LocalObjective(AuxiliaryObjective):
    """Two branches of one auxiliary block: a pooled head under supervision, and a decoder (SPEC, L_i).

    Args:
        auxiliary, decoding, loss_slices: see :class:`AuxiliaryObjective`.
        head: auxiliary features averaged over space (B, width) -> embeddings (``contrast``) or class logits
            (``cross_entropy``).
        supervision: the term that trains the head.
        weights: factors of ``contrast`` or ``cross_entropy``, and of ``reconstruction``.
        temperature: temperature of the contrastive loss.
        label_smoothing: label smoothing of the cross entropy.
    """

    def __init__(
        self,
        auxiliary: AuxiliaryBlock,
        head: nn.Module,
        decoding: Decoding | None,
        loss_slices: int,
        supervision: str,
        weights: dict[str, float],
        temperature: float,
        label_smoothing: float,
    ) -> None:
        super().__init__(auxiliary, head, decoding, loss_slices)
        self.supervision = supervision
        self.weights = weights
        self.temperature = temperature
        self.label_smoothing = label_smoothing

    def forward(
        self, inputs: Tensor, outputs: Tensor, images: Tensor | None, labels: Tensor
    ) -> tuple[Terms, Tensor | None]:
        pooled, reconstruction = self.branches(inputs, outputs, images)
        return {self.supervision: self._supervise(self.head(pooled), labels), **reconstruction}, None

    def _supervise(self, head: Tensor, labels: Tensor) -> Tensor:
        if self.supervision == "cross_entropy":
            return cross_entropy(head, labels, self.label_smoothing)
        if labels.is_floating_point():
            raise UserError("the contrastive loss needs one class per image: switch mixup and cutmix off")
        with without_autocast(head.device):
            return supervised_nt_xent(head.float(), labels, self.temperature)


class ObjectiveWithDecoder(AuxiliaryObjective):
    """Any other objective, with a decoder that has an auxiliary block of its own.

    Args:
        auxiliary, decoding, loss_slices: see :class:`AuxiliaryObjective`.
        head: the other objective.
        weight: factor of ``reconstruction``.
    """

    head: Objective

    def __init__(
        self, auxiliary: AuxiliaryBlock, head: Objective, decoding: Decoding, loss_slices: int, weight: float
    ) -> None:
        super().__init__(auxiliary, head, decoding, loss_slices)
        self.watched = head.watched
        self.uses_images |= head.uses_images
        self.weights = {**head.weights, "reconstruction": weight}

    def forward(
        self, inputs: Tensor, outputs: Tensor, images: Tensor | None, labels: Tensor
    ) -> tuple[Terms, Tensor | None]:
        terms, logits = self.head(inputs, outputs, images, labels)
        return {**terms, **self.branches(inputs, outputs, images)[1]}, logits

    def watch(self) -> AbstractContextManager[None]:
        """Let the other objective watch the body."""
        return self.head.watch()

    def watched_terms(self) -> Terms:
        """Return what the other objective watched."""
        return self.head.watched_terms()

    def passed(self, blocks: int, features: Tensor) -> None:
        """Let the other objective take note of features."""
        self.head.passed(blocks, features)

    def after_step(self) -> None:
        """Update what the other objective keeps."""
        self.head.after_step()


def _in_float16(features: Tensor) -> bool:
    """Tell whether convolutions of these features compute in float16."""
    autocast = AutocastState.of(features.device)
    return (autocast.dtype if autocast.enabled else features.dtype) == torch.float16

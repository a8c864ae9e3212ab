"""What a local module is trained for: the base class, and cross entropy of a head or of the final classifier."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localfeat.efficiency.autocast import without_autocast
from localfeat.methods.parts.watched import Watched

Terms = dict[str, Tensor]


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

    def passed(self, blocks: int, features: Tensor) -> None:
        """Take note of features within the body, with their graph: the inputs (0 blocks), then every block's output."""

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


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Return the cross entropy of logits (B, classes), in float32; labels are indices (B,) or probabilities."""
    with without_autocast(logits.device):
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)

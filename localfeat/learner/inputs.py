"""Check what a library user gives, arguments and batches, so that a mistake is one line and not a torch error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from localfeat.backbones.timm_models import channels_of
from localfeat.utils.errors import UserError

_WANTED = "a batch is (images, labels): float images (B, C, H, W) and int64 class indices (B,)"


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raise a UserError unless ``value`` is a ``kind`` or None."""
    if value is not None and not isinstance(value, kind):
        given = value.__name__ if isinstance(value, type) else type(value).__name__
        raise UserError(f"{name} is {given}: give localfeat.{kind.__name__}(…)")


def number_of_classes(backbone: Any) -> int:
    if not isinstance(backbone, nn.Module):
        raise UserError(
            f"the backbone is {type(backbone).__name__}: give a model, timm.create_model(…, num_classes=10)"
        )
    found = getattr(backbone, "num_classes", None)
    if not isinstance(found, int):
        raise UserError(
            f"the backbone {type(backbone).__name__} has no num_classes, which every timm model has; "
            "of another network give the parts: localfeat.decompose(model, image_size)"
        )
    if found < 2:
        raise UserError(f"a backbone with num_classes={found} has no classifier to train")
    return found


def check_batch(
    batch: Any,
    num_classes: int,
    *,
    training: bool,
    values: bool = True,
    at_least: int = 1,
    backbone: nn.Module | None = None,
) -> None:
    """Check a batch of ``(images, labels)``.

    Args:
        batch: what the DataLoader gives.
        num_classes: the classifier's classes.
        training: whether labels may be probabilities (B, num_classes), as mixup makes them.
        values: whether to look at the labels' values.
        at_least: the fewest images; 2 for a method that compares the images of a batch.
        backbone: the timm model that the images are for; ``None`` leaves their channels and size unchecked.

    Raises:
        UserError: another structure, labels of a wrong type, shape or range, too few images to contrast.
    """
    parts = [type(part).__name__ for part in batch] if isinstance(batch, tuple | list) else None
    if parts is None or len(parts) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise UserError(f"{_WANTED}; this one is {type(batch).__name__ if parts is None else ', '.join(parts)}")
    images, labels = batch
    check_images(images, backbone)
    if labels.ndim == 0 or len(labels) != len(images):
        raise UserError(f"labels of shape {list(labels.shape)} for {len(images)} images: {_WANTED}")
    if len(images) == 0:
        raise UserError("a batch without images")
    if labels.is_floating_point():
        _check_probabilities(labels, num_classes, training=training, values=values)
    elif labels.dtype != torch.int64:
        raise UserError(f"labels are {_name(labels.dtype)}: class indices are int64, labels.long()")
    elif labels.ndim != 1:
        raise UserError(f"labels have the shape {list(labels.shape)}: class indices are int64 (B,)")
    elif values and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        low, high = int(labels.min()), int(labels.max())
        raise UserError(f"labels lie between {low} and {high}: this classifier has the classes 0 to {num_classes - 1}")
    if len(labels) < at_least:
        raise UserError(f"a batch of {len(labels)}: this method compares the images of a batch, at least {at_least}")


def check_images(images: Any, backbone: nn.Module | None = None) -> None:
    """Check the images of a batch, see :func:`check_batch`.

    Raises:
        UserError: no float tensor of four dimensions, or images that the backbone was not built for.
    """
    if not isinstance(images, Tensor):
        raise UserError(f"images are {type(images).__name__}: give a float tensor (B, C, H, W)")
    if not images.is_floating_point():
        raise UserError(f"images are {_name(images.dtype)}: give normalised floats (B, C, H, W)")
    if images.dtype == torch.float64:
        raise UserError("images are float64: give float32, images.float()")
    if images.ndim != 4:
        raise UserError(f"images have the shape {list(images.shape)}: give (B, C, H, W)")
    if backbone is not None and list(images.shape[1:]) != (wanted := _taken(backbone, images)):
        raise UserError(f"images have the shape {list(images.shape)}: this backbone takes [B, {str(wanted)[1:]}")


def _taken(backbone: nn.Module, images: Tensor) -> list[int]:
    """Return the shape of one image that the backbone takes; of any size unless its patch embedding has a fixed one."""
    embed: Any = getattr(backbone, "patch_embed", None)
    size = embed.img_size if getattr(embed, "strict_img_size", False) else images.shape[2:]
    return [channels_of(backbone), *size]


def _check_probabilities(labels: Tensor, num_classes: int, *, training: bool, values: bool) -> None:
    if not training or labels.ndim != 2 or labels.shape[1] != num_classes:
        also = f", in training also probabilities (B, {num_classes})" if training else ""
        raise UserError(f"labels are {_name(labels.dtype)} {list(labels.shape)}: class indices are int64 (B,){also}")
    if values and not (bool((labels >= 0).all()) and torch.allclose(labels.sum(1), labels.new_ones(()), atol=1e-3)):
        raise UserError(
            "float labels are probabilities that sum to 1 for every image; several labels are not supported"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

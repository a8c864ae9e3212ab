"""Mixup and CutMix with a separate mixing share for every image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from localfeat.data.batched_transforms import Boxes, box_mask


def mix(images: Tensor, labels: Tensor, num_classes: int, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mix every image with its neighbour in the (shuffled) batch.

    Mixup (Zhang et al. 2018) blends s x_i + (1 - s) x_j with s ~ Beta(mixup, mixup). CutMix (Yun et al. 2019)
    pastes a rectangle of x_j whose area share is 1 - s, s ~ Beta(cutmix, cutmix); the labels use the visible share,
    since the rectangle is clipped to the image. With both above zero each image gets one of them with equal
    probability.

    Args:
        images: (B, C, H, W) float, normalised.
        labels: (B,) int64.
        num_classes: width of the soft labels.
        mixup, cutmix: parameters of the Beta distributions; 0 switches off.

    Returns:
        The mixed images and soft labels (B, num_classes) whose rows sum to 1.
    """
    batch, _, height, width = images.shape
    cut = torch.rand(batch) < 0.5 if mixup > 0 and cutmix > 0 else torch.full((batch,), cutmix > 0)
    alpha = torch.where(cut, torch.tensor(float(cutmix)), torch.tensor(float(mixup)))
    share = torch.distributions.Beta(alpha, alpha).sample()
    pasted = box_mask(_boxes(1 - share, height, width), height, width)  # true where the other image is visible
    share = torch.where(cut, 1 - pasted.float().mean((1, 2)), share).to(images.device)
    own = 1 - pasted.to(images.device).float()
    weights = torch.where(cut.to(images.device)[:, None, None], own, share[:, None, None])
    targets = F.one_hot(labels, num_classes).float()
    mixed = torch.lerp(images.roll(1, 0), images, weights[:, None])
    return mixed, torch.lerp(targets.roll(1, 0), targets, share[:, None])


def _boxes(area: Tensor, height: int, width: int) -> Boxes:
    """Draw boxes of the image's aspect and the given area shares (B,) at uniform centres; they may cross the edges."""
    side = area.sqrt()
    h, w = (height * side).long(), (width * side).long()
    top = torch.randint(0, height, area.shape) - h // 2
    left = torch.randint(0, width, area.shape) - w // 2
    return Boxes(top, left, h, w)

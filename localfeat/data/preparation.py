"""Turn uint8 batches into network inputs: augment, resize, normalise, mix; all on the batch's device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from localfeat.data import batched_transforms as batched
from localfeat.data.mixing import mix
from localfeat.data.randaugment import rand_augment
from localfeat.utils.errors import UserError
from localfeat.utils.sizes import sides

AUGMENTATIONS = ("swin", "light", "none")
SMALL_SIDE = 40  # px; up to this size "swin" pads and crops, as a random resized crop would leave too few pixels


class Preparation:
    """Callable that turns uint8 images into normalised float images, with fresh random parameters for each image.

    Augmentations of training batches:

    - ``none``: resize and normalise only.
    - ``light``: pad with zeros by an eighth of the shorter side, crop randomly to the old size, flip; then as ``none``.
    - ``swin``: the recipe of Swin (Liu et al. 2021, timm): random resized crop (``light``'s crop for sources of at most
      40 px), horizontal flip, RandAugment with 2 operations at magnitude 9 +- 0.5, normalise, random erasing with
      probability 0.25. RandAugment runs before small sources are resized, where it costs a fraction.

    Args:
        image_size: side in pixels of the result, or height and width.
        augmentation: one of the three names.
        horizontal_flip: whether to flip; off for classes that a mirror changes, such as digits.
        mixup, cutmix: parameters of the Beta distributions; 0 switches off. Labels become soft if either is on.
        num_classes: width of soft labels.
        mean, std: three channel values for pixels in 0..1.

    Raises:
        UserError: values out of range.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        augmentation: str,
        horizontal_flip: bool,
        mixup: float,
        cutmix: float,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        check_options(image_size, augmentation, mixup, cutmix, mean, std)
        self.image_size, self.augmentation, self.horizontal_flip = sides(image_size), augmentation, horizontal_flip
        self.mixup, self.cutmix, self.num_classes = mixup, cutmix, num_classes
        self.mean, self.std = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
        """Prepare a batch, see `ImageDataModule.prepare`."""
        images = batched.centre(images.expand(-1, 3, -1, -1), self.image_size)
        with torch.autocast(images.device.type, enabled=False):
            images = self._augment(images) if training else images
            images = batched.normalise(batched.resize(images.float(), self.image_size), self.mean, self.std)
            if training and self.augmentation == "swin":
                images = batched.random_erasing(images)
            if training and (self.mixup > 0 or self.cutmix > 0):
                images, labels = mix(images, labels, self.num_classes, self.mixup, self.cutmix)
        return images, labels

    def _augment(self, images: Tensor) -> Tensor:
        """Augment uint8 (B, 3, h, w); return images in 0..255, of source or final size."""
        if self.augmentation == "none":
            return images
        flips = batched.draw_flips(len(images)) if self.horizontal_flip else None
        height, width = images.shape[-2:]
        if self.augmentation == "light" or min(height, width) <= SMALL_SIDE:
            if height > self.image_size[0]:  # crop at the smaller of the two sizes
                images = batched.resize(images.float(), self.image_size)
            images = batched.padded_crop(images, max(1, min(images.shape[-2:]) // 8), flips)
        else:
            boxes = batched.draw_crops(len(images), height, width)
            images = batched.crop_and_resize(images.float(), boxes, self.image_size, flips)
        if self.augmentation == "swin":
            pixels = images if images.dtype == torch.uint8 else images.round().to(torch.uint8)
            images = rand_augment(pixels, fill=(self.mean * 255).round().tolist())
        return images


def check_options(
    image_size: int | Sequence[int],
    augmentation: str,
    mixup: float,
    cutmix: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Raise ``UserError`` for values that `Preparation` does not accept."""
    sides(image_size)
    if augmentation not in AUGMENTATIONS:
        raise UserError(f"augmentation={augmentation}: it is one of {', '.join(AUGMENTATIONS)}")
    for name, value in (("mixup", mixup), ("cutmix", cutmix)):
        if not 0 <= value < float("inf"):
            raise UserError(f"{name}={value}: the parameter of its Beta distribution must be 0 (off) or positive")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(f"mean={list(mean)}, std={list(std)}: each needs three values, and std must be above 0")

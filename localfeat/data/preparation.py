"""Turn batches of images in 0..255 into network inputs: augment, resize, normalise, mix; all on the batch's device."""

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
    """Callable that turns images in 0..255 into normalised float images, with fresh random parameters for each image.

    Augmentations of training batches:

    - ``none``: resize and normalise only.
    - ``light``: pad with zeros by an eighth of the shorter side, crop randomly to the old size, flip; then as ``none``.
    - ``swin``: the recipe of Swin (Liu et al. 2021, timm): random resized crop (``light``'s crop for sources of at most
      40 px), horizontal flip, RandAugment with 2 operations at magnitude 9 +- 0.5, normalise, random erasing with
      probability 0.25. RandAugment runs before small sources are resized, where it costs a fraction, and rounds pixels
      to 8 bits.

    Grey images are repeated for networks of more channels; RGB images become grey (ITU-R 601-2 luma) for those of one.

    Args:
        image_size: side in pixels of the result, or height and width.
        augmentation: one of the three names.
        horizontal_flip: whether to flip; off for classes that a mirror changes, such as digits.
        mixup, cutmix: parameters of the Beta distributions; 0 switches off. Labels become soft if either is on.
        num_classes: width of soft labels.
        mean, std: one value for each channel of the network's images, for pixels in 0..1.

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
        images = batched.centre(with_channels(images, len(self.mean)), self.image_size)
        with torch.autocast(images.device.type, enabled=False):
            images = self._augment(images) if training else images
            images = batched.normalise(batched.resize(images.float(), self.image_size), self.mean, self.std)
            if training and self.augmentation == "swin":
                images = batched.random_erasing(images)
            if training and (self.mixup > 0 or self.cutmix > 0):
                images, labels = mix(images, labels, self.num_classes, self.mixup, self.cutmix)
        return images, labels

    def _augment(self, images: Tensor) -> Tensor:
        """Augment (B, C, h, w); return images in 0..255, of source or final size."""
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
    if not mean or len(mean) != len(std) or min(std) <= 0:
        raise UserError(f"mean={list(mean)}, std={list(std)}: each needs a value per channel, and std must be above 0")


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Return images (B, C, h, w) with so many channels: as they are, one repeated, or three as grey.

    Raises:
        UserError: any other number.
    """
    has = images.shape[1]
    if has == channels:
        return images
    if has == 1:
        return images.expand(-1, channels, -1, -1)
    if has == 3 and channels == 1:
        luma = (images.int() * torch.tensor([19595, 38470, 7471], device=images.device)[:, None, None]).sum(
            1, keepdim=True
        )
        return ((luma + 2**15) >> 16).to(images.dtype)  # as PIL
    raise UserError(f"in_chans={channels}: these images have {has} channels")

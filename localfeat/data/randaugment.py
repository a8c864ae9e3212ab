"""RandAugment (Cubuk et al. 2020) on a uint8 batch, with separate operations and magnitudes for every image.

The operations and their levels are timm's "increasing" set (``rand-m9-mstd0.5-inc1``, the Swin recipe), in which a
higher level is always a stronger change. Two deviations: geometric operations sample bilinearly (timm: bilinear or
bicubic at random), and posterize keeps at least one bit (at level 10 timm's keeps none, which gives a black image).

Images that drew the same operation are grouped and changed at once, so there is no loop over images.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LEVEL = 10.0
Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


def rand_augment(
    images: Tensor,
    fill: Sequence[float],
    num_ops: int = 2,
    magnitude: float = 9.0,
    std: float = 0.5,
    probability: float = 0.5,
) -> Tensor:
    """Apply ``num_ops`` random operations, one after the other.

    Args:
        images: (B, C, H, W) uint8.
        fill: values 0..255 of the channels for pixels that come from outside the image.
        num_ops: operations per image, drawn with replacement.
        magnitude, std: mean and standard deviation of the normal distribution of levels, which are clamped to 0..10.
        probability: chance that a drawn operation is applied at all.
    """
    colour = torch.tensor(fill, dtype=torch.float32, device=images.device)
    for _ in range(num_ops):
        choice = torch.randint(0, len(OPERATIONS), (len(images),))
        choice[torch.rand(len(images)) >= probability] = len(OPERATIONS)  # the last group is left alone
        levels = (magnitude + std * torch.randn(len(images))).clamp(0, MAX_LEVEL)
        signs = torch.where(torch.rand(len(images)) < 0.5, -1.0, 1.0)
        images = _apply_by_group(images, choice, torch.stack([levels, signs]), colour)
    return images


def _apply_by_group(images: Tensor, choice: Tensor, drawn: Tensor, fill: Tensor) -> Tensor:
    """Sort the batch by operation, change each run of equal operations at once, and restore the order."""
    order = torch.argsort(choice, stable=True)
    counts = torch.bincount(choice, minlength=len(OPERATIONS) + 1).tolist()
    back = order.to(images.device)
    groups = images[back].split(counts)
    arguments = drawn[:, order].to(images.device).split(counts, dim=1)
    changed = [
        operation(group, magnitude(*argument), fill) if len(group) else group
        for (operation, magnitude), group, argument in zip(OPERATIONS.values(), groups, arguments, strict=False)
    ]
    return torch.empty_like(images).index_copy_(0, back, torch.cat([*changed, groups[-1]]))


# ---- operations: uint8 (n, C, H, W), one magnitude per image (n,), fill (C,) -> uint8 (n, C, H, W)


def auto_contrast(images: Tensor, _: Tensor, fill: Tensor) -> Tensor:
    """Stretch each channel to 0..255; a constant channel stays as it is."""
    x = images.float()
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    stretched = (x - low) * (255 / (high - low).clamp(min=1))
    return torch.where(high > low, stretched, x).to(torch.uint8)


def equalize(images: Tensor, _: Tensor, fill: Tensor) -> Tensor:
    """Flatten each channel's histogram with PIL's rounding."""
    flat = images.flatten(2).long()  # (n, C, H * W)
    histogram = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, flat, torch.ones_like(flat))
    cumulative = histogram.cumsum(2)
    brightest = histogram.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - brightest) // 255
    below = F.pad(cumulative, (1, 0))[..., :-1]
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(2, flat), flat).view_as(images).to(torch.uint8)


def invert(images: Tensor, _: Tensor, fill: Tensor) -> Tensor:
    """Return 255 - x."""
    return 255 - images


def posterize(images: Tensor, bits: Tensor, fill: Tensor) -> Tensor:
    """Keep the ``bits`` highest bits of each value."""
    mask = 256 - torch.exp2(8 - bits)  # 256 - 2 ** (8 - bits)
    return images & mask.to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: Tensor, threshold: Tensor, fill: Tensor) -> Tensor:
    """Invert the values from ``threshold`` (0..256) upwards."""
    return torch.where(images.short() >= threshold.short().view(-1, 1, 1, 1), 255 - images, images)


def solarize_add(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Add ``amount`` to the values below 128."""
    brighter = (images.short() + amount.short().view(-1, 1, 1, 1)).clamp(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def color(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    """Blend with the grey image; factor 0 is grey, 1 no change."""
    return _blend(_grey(images), images, factor)


def contrast(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    """Blend with the constant mean grey of the image."""
    return _blend(_grey(images).mean((1, 2, 3), keepdim=True), images, factor)


def brightness(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    """Blend with black."""
    return _blend(torch.zeros((), device=images.device), images, factor)


def sharpness(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    """Blend with a smoothed image (3 x 3, centre weight 5 of 13); the border stays as it is."""
    if min(images.shape[-2:]) < 3:
        return images
    x = images.float()
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    inner = F.conv2d(x, (kernel / 13).expand(x.shape[1], 1, 3, 3), groups=x.shape[1]).round()
    smooth = x.clone()
    smooth[..., 1:-1, 1:-1] = inner
    return _blend(smooth, images, factor)


def shear_x(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    """Map input pixel (x + factor * y, y) to output pixel (x, y); the origin is the upper left corner."""
    one, zero = torch.ones_like(factor), torch.zeros_like(factor)
    return _affine(images, [one, factor, zero, zero, one, zero], fill)


def shear_y(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    """Map input pixel (x, y + factor * x) to output pixel (x, y)."""
    one, zero = torch.ones_like(factor), torch.zeros_like(factor)
    return _affine(images, [one, zero, zero, factor, one, zero], fill)


def translate_x(images: Tensor, share: Tensor, fill: Tensor) -> Tensor:
    """Map input pixel (x + share * width, y) to output pixel (x, y)."""
    one, zero = torch.ones_like(share), torch.zeros_like(share)
    return _affine(images, [one, zero, share * images.shape[-1], zero, one, zero], fill)


def translate_y(images: Tensor, share: Tensor, fill: Tensor) -> Tensor:
    """Map input pixel (x, y + share * height) to output pixel (x, y)."""
    one, zero = torch.ones_like(share), torch.zeros_like(share)
    return _affine(images, [one, zero, zero, zero, one, share * images.shape[-2]], fill)


def rotate(images: Tensor, degrees: Tensor, fill: Tensor) -> Tensor:
    """Rotate counter-clockwise about the centre."""
    angle = torch.deg2rad(degrees)
    cos, sin = angle.cos(), angle.sin()
    cx, cy = images.shape[-1] / 2, images.shape[-2] / 2
    return _affine(images, [cos, -sin, cx - cos * cx + sin * cy, sin, cos, cy - sin * cx - cos * cy], fill)


def _blend(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Return other + factor * (images - other), clamped to 0..255."""
    return torch.lerp(other, images.float(), factor.view(-1, 1, 1, 1)).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Return the luma of RGB images, else the mean channel, as (n, 1, H, W) float in whole numbers."""
    if images.shape[1] == 3:
        weights = torch.tensor([0.2989, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
        return (images * weights).sum(1, keepdim=True).floor()
    return images.float().mean(1, keepdim=True).round()


def _affine(images: Tensor, matrix: list[Tensor], fill: Tensor) -> Tensor:
    """Sample bilinearly at x' = a x + b y + c, y' = d x + e y + f, in pixels measured from the upper left corner.

    Args:
        images: (n, C, H, W) uint8.
        matrix: a, b, c, d, e, f, each (n,).
        fill: (C,) value of pixels outside the image.
    """
    height, width = images.shape[-2:]
    a, b, c, d, e, f = matrix
    # affine_grid works in coordinates -1..1 over the image: x = (u + 1) * width / 2.
    theta = torch.stack(
        [
            torch.stack([a, b * height / width, a + b * height / width + 2 * c / width - 1], -1),
            torch.stack([d * width / height, e, d * width / height + e + 2 * f / height - 1], -1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, [*images.shape], align_corners=False)
    outside = fill.view(1, -1, 1, 1)
    sampled = F.grid_sample(images - outside, grid, padding_mode="zeros", align_corners=False)  # zero means fill
    return (sampled + outside).round_().clamp_(0, 255).to(torch.uint8)


# ---- level 0..10 and a random sign, (n,) each -> magnitude (n,), as timm's LEVEL_TO_ARG


def _signed(maximum: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda level, sign: sign * level / MAX_LEVEL * maximum


def _enhancement(level: Tensor, sign: Tensor) -> Tensor:
    return (1 + sign * level / MAX_LEVEL * 0.9).clamp(min=0.1)


def _none(level: Tensor, sign: Tensor) -> Tensor:
    return level


OPERATIONS: dict[str, tuple[Operation, Callable[[Tensor, Tensor], Tensor]]] = {
    "AutoContrast": (auto_contrast, _none),
    "Equalize": (equalize, _none),
    "Invert": (invert, _none),
    "Rotate": (rotate, _signed(30.0)),
    "PosterizeIncreasing": (posterize, lambda level, _: (4 - (level / MAX_LEVEL * 4).floor()).clamp(min=1)),
    "SolarizeIncreasing": (solarize, lambda level, _: 256 - (level / MAX_LEVEL * 256).floor()),
    "SolarizeAdd": (solarize_add, lambda level, _: (level / MAX_LEVEL * 110).floor()),
    "ColorIncreasing": (color, _enhancement),
    "ContrastIncreasing": (contrast, _enhancement),
    "BrightnessIncreasing": (brightness, _enhancement),
    "SharpnessIncreasing": (sharpness, _enhancement),
    "ShearX": (shear_x, _signed(0.3)),
    "ShearY": (shear_y, _signed(0.3)),
    "TranslateXRel": (translate_x, _signed(0.45)),
    "TranslateYRel": (translate_y, _signed(0.45)),
}

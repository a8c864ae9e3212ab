"""Registry of data sources by name."""

from collections.abc import Callable, Sequence
from pathlib import Path

from localfeat.data import torchvision_sources
from localfeat.data.image_folder import ImageFolder
from localfeat.data.pixels import RGB, Pixels
from localfeat.data.sources import Digits, Source
from localfeat.utils.errors import UserError


def make_source(
    name: str,
    root: str | Path,
    image_size: int | Sequence[int],
    in_memory: bool | None,
    skip_bad_images: bool = False,
    pixels: Pixels = RGB,
) -> Source:
    """Make the source called ``name`` with files below ``root``; the other arguments are for image folders only.

    Raises:
        UserError: an unknown name, channels that the source does not have, an image folder without the expected layout.
    """
    makers: dict[str, Callable[[], Source]] = {
        "digits": Digits,
        "cifar10": lambda: torchvision_sources.cifar10(Path(root)),
        "cifar100": lambda: torchvision_sources.cifar100(Path(root)),
        "stl10": lambda: torchvision_sources.stl10(Path(root)),
        "svhn": lambda: torchvision_sources.svhn(Path(root)),
        "image_folder": lambda: ImageFolder(Path(root), image_size, in_memory, skip_bad_images, pixels),
    }
    if name not in makers:
        raise UserError(f"unknown data source {name!r}; there are {', '.join(makers)}")
    if name != "image_folder" and pixels.channels not in (1, 3):
        raise UserError(f"in_chans={pixels.channels}: {name} has images of 3 channels; it can be 3, or 1 for grey")
    if name != "image_folder" and pixels.value_range is not None:
        given = f"value_range={list(pixels.value_range)}"
        raise UserError(f"{given}: it is for the .npy and TIFF files of an image folder, not for {name}")
    return makers[name]()

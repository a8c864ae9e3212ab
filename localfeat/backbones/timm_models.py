"""Build backbones with timm, turn its failures into one line and check image sizes against windows."""

from __future__ import annotations

import re
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub as hub
import timm
from timm.data.constants import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data.constants import IMAGENET_DEFAULT_STD as IMAGENET_STD
from timm.layers.space_to_depth import SpaceToDepth
from timm.models.csatv2 import LearnableDct2d
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from localfeat.utils.channels import per_channel
from localfeat.utils.errors import UserError
from localfeat.utils.sizes import as_size, sides
from localfeat.utils.text import meant


def build_backbone(
    name: str,
    num_classes: int,
    *,
    image_size: int | Sequence[int] | None = None,
    in_chans: int = 3,
    variants: Mapping[int, str] | None = None,
    pretrained: bool = False,
    drop_path_rate: float | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a timm model with a classifier of ``num_classes`` outputs.

    Args:
        name: a timm model name, e.g. ``swin_tiny_patch4_window7_224``.
        num_classes: number of the classifier's outputs.
        image_size: side of the input in pixels, or height and width; ``None`` keeps the model's default.
        in_chans: channels of the images; pretrained weights are adapted as timm does.
        variants: image size -> the timm model to use instead of ``name`` at that size.
        pretrained: whether to download timm's ImageNet weights (the classifier is new if its size differs).
        drop_path_rate: rate of stochastic depth; ``None`` keeps the model's default.
        arguments: further constructor arguments of the model, e.g. ``{"depths": [2, 2, 2, 2]}``.

    Raises:
        UserError: an unknown name or argument, an argument that makes timm read a file or download, weights that
            cannot be downloaded, an image size that the model's patches or windows cannot tile.
    """
    name = model_name(name, image_size, variants)
    check_arguments(arguments or {})
    if drop_path_rate is not None and not 0 <= drop_path_rate < 1:
        raise UserError(f"backbone.drop_path_rate={drop_path_rate}: it must lie in [0, 1)")
    options: dict[str, Any] = {**(arguments or {}), "num_classes": num_classes}
    if in_chans != 3:
        options["in_chans"] = in_chans
    if drop_path_rate is not None:
        options["drop_path_rate"] = drop_path_rate
    try:
        with warnings.catch_warnings(), _hub_offline_without_network() if pretrained else nullcontext():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # a refusal is one line
            model = _created(name, pretrained, options, image_size)
    except Exception as error:
        explained = _explained(error, name, pretrained, bool(arguments))
        if explained is None:
            raise
        raise explained from error
    if isinstance(model, SwinTransformer | SwinTransformerV2):
        _check_windows(model)
    return model


def model_name(name: str, image_size: int | Sequence[int] | None, variants: Mapping[int, str] | None = None) -> str:
    """Return the timm model for an image size: the variant for that size, else ``name``.

    Raises:
        UserError: timm has no such model.
    """
    chosen = (variants or {}).get(image_size, name) if isinstance(image_size, int) else name
    architecture, _, tag = chosen.partition(".")  # a tag names pretrained weights; hf-hub:… and paths are refused
    if not timm.is_model(architecture) or (tag and chosen not in timm.list_pretrained(f"{architecture}.*")):
        suggestion = meant(chosen, timm.list_models(), cutoff=0.6) or " (see timm.list_models())"
        raise UserError(f"backbone.name={chosen}: timm has no such model{suggestion}")
    return chosen


_NO_ARGUMENTS = (
    "checkpoint_path",
    "cache_dir",
    "features_only",
    "pruned",
    "kwargs_filter",
    "num_classes",
    "scriptable",
)
_OVERLAY = ("input_size", "fixed_input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation", "pool_size")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that make ``timm.create_model`` read files, download, or build anything but a plain model.

    ``pretrained_cfg_overlay`` may hold only the keys that say how to prepare images.

    Raises:
        UserError: an argument is refused; the message names it.
    """
    for name, value in arguments.items():
        if name == "pretrained_cfg_overlay" and isinstance(value, Mapping):
            if other := [key for key in value if key not in _OVERLAY]:
                raise UserError(f"backbone.arguments.{name}: {other[0]} cannot be set, only {', '.join(_OVERLAY)}")
        elif name in _NO_ARGUMENTS or str(name).startswith("pretrained"):
            raise UserError(
                f"backbone.arguments.{name}: not an argument of the network itself; for initial weights use "
                "backbone.pretrained=true or backbone.weights=<file>"
            )


def _created(name: str, pretrained: bool, options: dict[str, Any], image_size: int | Sequence[int] | None) -> nn.Module:
    """Return timm's model, built for the image size if it asks for one, as transformers do."""
    if image_size is not None and "img_size" not in options:
        height, width = sides(image_size)
        try:
            sized = {**options, "img_size": height if height == width else (height, width)}
            return timm.create_model(name, pretrained=pretrained, **sized)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
    return timm.create_model(name, pretrained=pretrained, **options)


@contextmanager
def _hub_offline_without_network() -> Iterator[None]:
    """Restrict the hub client to its cache when its host has no address, instead of retrying for a minute."""
    before = hub.constants.HF_HUB_OFFLINE
    try:
        if not getproxies():  # behind a proxy, names need not resolve here
            socket.getaddrinfo(urlsplit(hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.constants.HF_HUB_OFFLINE = before


def _explained(error: Exception, name: str, pretrained: bool, arguments: bool) -> UserError | None:
    """Return the error as one that the user can fix; ``None`` for a bug in timm or here."""
    if found := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
        others = f": does it belong to another network? backbone=timm backbone.name={name} starts without"
        return UserError(f"backbone: timm's {name} takes no argument {found[1]}{others if arguments else ''}")
    if (arguments or isinstance(error, TypeError | AssertionError | ValueError)) and not pretrained:
        reason = next(iter(str(error).strip().splitlines()), "")
        return UserError(f"backbone: timm's {name} cannot be built like this: {type(error).__name__} {reason}".rstrip())
    if pretrained:
        return UserError(
            f"backbone.pretrained=true: the weights of {name} cannot be downloaded ({type(error).__name__}); "
            "put them in a file and use backbone.weights=<file.safetensors>"
        )
    return None


def _check_windows(model: SwinTransformer | SwinTransformerV2) -> None:
    """Refuse sizes at which timm would silently pad windows or lose pixels."""
    embed: Any = model.patch_embed
    size, (patch, _) = embed.img_size, embed.patch_size
    stages: list[Any] = list(model.layers)
    if not all(len(stage.blocks) for stage in stages):
        raise UserError(
            f"backbone.arguments.depths={[len(s.blocks) for s in stages]}: every stage needs at least one block"
        )
    if min(size) < patch:
        raise UserError(f"image_size={as_size(size)}: it is smaller than a patch of {patch} px")
    windows = [max(stage.blocks[0].window_size[axis] for stage in stages) for axis in (0, 1)]

    def fits(candidate: int, window: int) -> bool:  # a stage smaller than the window is one window
        side, rest = divmod(candidate, patch * 2 ** (len(stages) - 1))
        all_sides = [side * 2**stage for stage in range(len(stages))]
        return side > 0 and not rest and all(s % min(window, s) == 0 for s in all_sides)

    for side, window in zip(size, windows, strict=True):
        if not fits(side, window):
            below = next((c for c in range(side, 0, -1) if fits(c, window)), None)
            above = next(c for c in range(side, 4 * side + 4 * patch * window * 2 ** len(stages)) if fits(c, window))
            what = "it" if size[0] == size[1] else f"{side} px"
            raise UserError(
                f"image_size={as_size(size)}: patches of {patch} px and windows of {window} over {len(stages)} stages "
                f"cannot tile {what}; sizes that work: {', '.join(str(c) for c in (below, above) if c)}"
            )


def image_size_of(backbone: nn.Module, wanted: int | Sequence[int] | None = None) -> tuple[int, int]:
    """Return height and width in pixels of the images that a model is trained on.

    Some transformers' size is fixed when they are built. Any other network takes any size: ``wanted`` if given, else
    the size of its pretrained weights, else 224.

    Args:
        wanted: side in pixels, or height and width.

    Raises:
        UserError: ``wanted`` differs from the fixed size.
    """
    embed: Any = getattr(backbone, "patch_embed", None)
    fixed = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", True) else None
    if fixed is None and wanted is not None:
        return sides(wanted)
    height, width = fixed or _pretrained_config(backbone).get("input_size", (3, 224, 224))[1:]
    if wanted is not None and sides(wanted) != (height, width):
        raise UserError(f"image_size={as_size(wanted)}: this backbone was built for {as_size((height, width))} px")
    return int(height), int(width)


def channels_of(backbone: nn.Module) -> int:
    """Return the channels of the images that a network takes: those of its first convolution, 3 if it has none."""
    pixels = 1  # that a layer before it makes one of
    for module in backbone.modules():
        if isinstance(module, SpaceToDepth):
            pixels = int(module.bs) ** 2
        elif isinstance(module, LearnableDct2d):
            return 3
        elif isinstance(module, nn.Conv2d):
            return module.in_channels // pixels
    return 3


def normalisation_of(backbone: nn.Module, channels: int = 3) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation per channel (pixels in [0, 1]) that normalise a timm model's input.

    With other than three channels each gets the averages, as the pretrained weights know nothing of them.
    """
    return _normalisation(_pretrained_config(backbone), channels)


def normalisation_of_model(
    name: str, channels: int = 3, arguments: Mapping[str, Any] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return `normalisation_of` of the timm model that is built by this name and arguments."""
    known = timm.get_pretrained_cfg(name)
    overlay = (arguments or {}).get("pretrained_cfg_overlay") or {}
    return _normalisation({**(known.to_dict() if known else {}), **overlay}, channels)


def _normalisation(config: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = config.get("mean") or IMAGENET_MEAN, config.get("std") or IMAGENET_STD
    return per_channel(mean, channels), per_channel(std, channels)


def _pretrained_config(backbone: nn.Module) -> dict[str, Any]:
    return dict(getattr(backbone, "pretrained_cfg", None) or {})

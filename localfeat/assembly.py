"""From a timm model, a split and a method to the list of local modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from timm.data.constants import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data.constants import IMAGENET_DEFAULT_STD as IMAGENET_STD
from torch import nn

from localfeat.efficiency import Efficiency
from localfeat.errors import UserError
from localfeat.network import (
    BlockRunner,
    Decomposition,
    LocalModule,
    Split,
    as_split,
    block_runners,
    decompose,
    fuse_mlps,
    fuse_window_attention,
)
from localfeat.objectives import ClassifierObjective, DecoderFactory, Method, Objective, Site


def build_local_modules(
    backbone: nn.Module,
    method: Method,
    split: Split | int | Sequence[int],
    decoder: DecoderFactory,
    *,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    efficiency: Efficiency | None = None,
) -> nn.ModuleList:
    """Cut ``backbone`` and give every piece its objective.

    The pieces hold the backbone's own parameters: training them trains it. A method that is not local gets one
    module, whatever the split says (the split must still be possible).

    Raises:
        UserError: an unknown family, a split that the backbone cannot have, a target that the decoder cannot reach.
    """
    size = image_size_of(backbone, image_size)
    pieces = decompose(backbone, size)
    lengths = as_split(split, pieces.stage_depths).blocks_per_module(pieces.stage_depths)
    if not method.local:
        lengths = [sum(lengths)]
    efficiency = efficiency or Efficiency()
    runners = prepare_blocks(backbone, pieces, efficiency)
    expected = normalisation_of(backbone)
    modules = nn.ModuleList()
    start = 0
    for index, length in enumerate(lengths):
        stop = start + length
        site = Site(
            index=index,
            modules=len(lengths),
            inputs=pieces.shapes[start],
            outputs=pieces.shapes[stop],
            image_size=size,
            num_classes=cast(int, backbone.num_classes),
            mean=expected[0] if mean is None else mean,
            std=expected[1] if std is None else std,
            loss_slices=efficiency.loss_slices,
        )
        stem = pieces.stem if index == 0 else None
        objective = build_objective(pieces, method, site, decoder)
        modules.append(LocalModule(stem, pieces.blocks[start:stop], objective, runners[start:stop]))
        start = stop
    return modules


def prepare_blocks(backbone: nn.Module, pieces: Decomposition, efficiency: Efficiency) -> list[BlockRunner]:
    """How each block is to be computed; fused attention and MLPs are switched on in the backbone itself."""
    if efficiency.fused_attention:
        fuse_window_attention(backbone)
    if efficiency.fused_mlp:
        fuse_mlps(backbone)
    return block_runners(pieces.blocks, efficiency)


def build_objective(pieces: Decomposition, method: Method, site: Site, decoder: DecoderFactory) -> Objective:
    """What the module at ``site`` is trained for: the last one by the backbone's own classifier."""
    if site.index == site.modules - 1:
        return ClassifierObjective(pieces.tail, method.label_smoothing)
    return method.build(site, decoder)


def image_size_of(backbone: nn.Module, wanted: int | None = None) -> int:
    """Side in pixels of the square images that a timm model is trained on.

    A transformer's size is fixed when it is built. A convolutional network takes any: the ``wanted`` one, else
    that of its pretrained weights.

    Raises:
        UserError: a size other than the fixed one, or one that is not square.
    """
    embed: Any = getattr(backbone, "patch_embed", None)
    fixed = getattr(embed, "img_size", None)
    if fixed is None and wanted is not None:
        return wanted
    height, width = fixed or _config(backbone).get("input_size", (3, 224, 224))[1:]
    if height != width:
        raise UserError(f"this backbone takes {height} x {width} images: only square ones are supported")
    if wanted not in (None, height):
        raise UserError(f"image_size={wanted}: this backbone was built for {height} px")
    return int(height)


def normalisation_of(backbone: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel (pixels in [0, 1]) that a timm model expects of its images."""
    config = _config(backbone)
    return tuple(config.get("mean", IMAGENET_MEAN)), tuple(config.get("std", IMAGENET_STD))


def _config(backbone: nn.Module) -> dict[str, Any]:
    return dict(getattr(backbone, "pretrained_cfg", None) or {})

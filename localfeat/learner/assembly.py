"""Build the list of local modules from a timm model, a split and a method."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from torch import nn

from localfeat.backbones.decompose import Decomposition, decompose
from localfeat.backbones.split import Downsample, Split, as_split, downsample_of
from localfeat.backbones.timm_models import image_size_of, normalisation_of
from localfeat.efficiency.fused_mlp import fuse_mlps
from localfeat.efficiency.recompute import BlockRunner, block_runners
from localfeat.efficiency.settings import Efficiency
from localfeat.efficiency.window_attention import fuse_window_attention
from localfeat.methods.base import Method
from localfeat.methods.local_module import LocalModule
from localfeat.methods.objective import Objective
from localfeat.methods.parts.decoders import DecoderFactory
from localfeat.methods.site import Site


def build_local_modules(
    backbone: nn.Module | Decomposition,
    method: Method,
    split: Split | int | Sequence[int],
    decoder: DecoderFactory,
    *,
    image_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    efficiency: Efficiency | None = None,
) -> nn.ModuleList:
    """Cut ``backbone`` into local modules and give each its objective.

    The modules hold the backbone's own parameters: training them trains it. A method that is not local gets one
    module for any split (the split must still be valid).

    Raises:
        UserError: an unknown family, an impossible split, or a target that the decoder cannot reach.
    """
    pieces = backbone if isinstance(backbone, Decomposition) else cut_for(backbone, image_size, downsample_of(split))
    backbone = pieces.model
    lengths = as_split(split, pieces.stage_depths).blocks_per_module(pieces.stage_depths)
    efficiency = efficiency or Efficiency()
    runners = prepare_blocks(backbone, pieces, efficiency)
    spans = list(pairwise([0, *accumulate(lengths)]))
    sites = [
        site_of(pieces, span, index=index, modules=len(spans), efficiency=efficiency, mean=mean, std=std)
        for index, span in enumerate(spans)
    ]
    if method.local:
        objectives = [build_objective(method, site, decoder) for site in sites]
    else:
        spans, objectives = [(0, sum(lengths))], [method.build_whole(sites, decoder)]
    modules = nn.ModuleList()
    for (start, stop), objective in zip(spans, objectives, strict=True):
        stem = None if start else pieces.stem
        modules.append(LocalModule(stem, list(pieces.blocks[start:stop]), objective, runners[start:stop]))
    return modules


def cut_for(
    backbone: nn.Module, image_size: int | Sequence[int] | None, downsample: Downsample = "next"
) -> Decomposition:
    """Return the backbone in parts, at the image size that it is trained on."""
    return decompose(backbone, image_size_of(backbone, image_size), downsample=downsample)


def prepare_blocks(backbone: nn.Module, pieces: Decomposition, efficiency: Efficiency) -> list[BlockRunner]:
    """Return how each block is computed; switch fused attention and MLPs on in the backbone itself."""
    if efficiency.fused_attention:
        fuse_window_attention(backbone)
    if efficiency.fused_mlp:
        fuse_mlps(backbone)
    return block_runners(list(pieces.blocks), efficiency)


def site_of(
    pieces: Decomposition,
    span: tuple[int, int],
    *,
    index: int,
    modules: int,
    efficiency: Efficiency,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Site:
    """Return the site of module ``index`` of ``modules``, with blocks ``span`` (end exclusive)."""
    start, stop = span
    expected = normalisation_of(pieces.model, pieces.image[0])
    return Site(
        index=index,
        modules=modules,
        inputs=pieces.shapes[start],
        outputs=pieces.shapes[stop],
        image_size=pieces.image[1:],
        in_chans=pieces.image[0],
        num_classes=pieces.num_classes,
        mean=expected[0] if mean is None else mean,
        std=expected[1] if std is None else std,
        loss_slices=efficiency.loss_slices,
        blocks=tuple(pieces.blocks[start:stop]),
        above=tuple(pieces.blocks[stop:]),
        shapes=tuple(pieces.shapes),
        tail=pieces.tail,
        observable=not efficiency.compile and not any(map(efficiency.recomputes, range(start, stop))),
    )


def build_objective(method: Method, site: Site, decoder: DecoderFactory) -> Objective:
    """Return the objective of the module at ``site``."""
    return method.build_last(site) if site.index == site.modules - 1 else method.build(site, decoder)

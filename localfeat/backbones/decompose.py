"""A timm backbone as stem, indivisible blocks and tail, checked against the model itself.

Each family has one small adapter. To add a family, write a function ``model -> Decomposition`` and add its
class to ``_ADAPTERS``; :func:`decompose` proves it correct (same output, every parameter in exactly one part).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from localfeat.backbones.layout import FeatureShape, Layout
from localfeat.backbones.modes import evaluating
from localfeat.utils.errors import UserError

_Run = Callable[[nn.Module, Tensor], Tensor]


class Part(nn.Module):
    """A part of a backbone that is not a module there: some of the backbone's children and the function that runs them.

    The children and parameters are the backbone's own objects, so training a part trains the backbone. The
    backbone itself is deliberately not registered, as that would register the parameters of all other parts too.
    """

    def __init__(self, model: nn.Module, names: list[str], run: _Run) -> None:
        super().__init__()
        self._model = (model,)
        self._run = run
        for name in names:
            member = getattr(model, name, None)
            if isinstance(member, nn.Parameter):
                self.register_parameter(name, member)
            elif isinstance(member, nn.Module):
                self.add_module(name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self._model[0], x)


@dataclass
class Decomposition:
    """A backbone in parts: ``tail(blocks[-1](… blocks[0](stem(images))))`` are the model's logits."""

    stem: nn.Module
    blocks: list[nn.Module]
    tail: nn.Module
    layout: Layout
    stage_depths: list[int]  # blocks per stage; a columnar network (ViT) has one block per stage
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None
    shapes: list[FeatureShape] = field(default_factory=list)  # shapes[i]: input of block i; shapes[-1]: tail's

    def __call__(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.tail(x))


def _staged_blocks(stages: nn.Module) -> tuple[list[nn.Module], list[int]]:
    """Return the blocks and the depths of stages; a stage's leading ``downsample`` joins its first block."""
    blocks: list[nn.Module] = []
    depths = []
    for stage in stages.children():
        own: list[nn.Module] = list(cast(nn.Sequential, stage.blocks))
        if not isinstance(stage.downsample, nn.Identity):
            own[0] = nn.Sequential(cast(nn.Module, stage.downsample), own[0])
        blocks += own
        depths.append(len(own))
    return blocks, depths


def _swin(model: nn.Module) -> Decomposition:
    blocks, depths = _staged_blocks(cast(nn.Module, model.layers))
    tail = Part(model, ["norm", "head"], lambda m, x: m.forward_head(m.norm(x)))  # type: ignore[operator]
    return Decomposition(cast(nn.Module, model.patch_embed), blocks, tail, "NHWC", depths)


def _convnext(model: nn.Module) -> Decomposition:
    blocks, depths = _staged_blocks(cast(nn.Module, model.stages))
    tail = Part(model, ["norm_pre", "head"], lambda m, x: m.forward_head(m.norm_pre(x)))  # type: ignore[operator]
    return Decomposition(cast(nn.Module, model.stem), blocks, tail, "NCHW", depths)


def _vit(model: nn.Module) -> Decomposition:
    if not isinstance(model.patch_drop, nn.Identity):
        raise UserError("patch_drop_rate above 0 leaves no grid of patches to reconstruct: build this ViT without it")
    stem = Part(
        model,
        ["patch_embed", "cls_token", "reg_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre"],
        lambda m, x: m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed(x)))),  # type: ignore[operator]
    )
    tail = Part(
        model,
        ["norm", "attn_pool", "fc_norm", "head_drop", "head"],
        lambda m, x: m.forward_head(m.norm(x)),  # type: ignore[operator]
    )
    blocks = list(cast(nn.Sequential, model.blocks))
    grid = cast(tuple[int, int], tuple(model.patch_embed.grid_size))  # type: ignore[union-attr, arg-type]
    prefix = cast(int, model.num_prefix_tokens)
    return Decomposition(stem, blocks, tail, "NLC", [1] * len(blocks), prefix, grid)


def _resnet(model: nn.Module) -> Decomposition:
    stem = Part(
        model,
        ["conv1", "bn1", "act1", "maxpool"],
        lambda m, x: m.maxpool(m.act1(m.bn1(m.conv1(x)))),  # type: ignore[operator]
    )
    stages = [list(cast(nn.Sequential, getattr(model, f"layer{i}"))) for i in range(1, 5)]
    tail = Part(model, ["global_pool", "fc"], lambda m, x: m.forward_head(x))  # type: ignore[operator]
    return Decomposition(stem, [b for s in stages for b in s], tail, "NCHW", [len(s) for s in stages])


_ADAPTERS: dict[type[nn.Module], Callable[[nn.Module], Decomposition]] = {
    SwinTransformer: _swin,
    SwinTransformerV2: _swin,
    VisionTransformer: _vit,
    ConvNeXt: _convnext,
    ResNet: _resnet,
}


def decompose(model: nn.Module, image_size: int) -> Decomposition:
    """Cut ``model`` into stem, blocks and tail and prove that nothing was lost.

    Run the model and its parts on one random image of ``image_size`` pixels (evaluation mode, no gradients, the
    global random state untouched) to record the shapes between blocks and to compare the outputs; on the meta
    device, which has no values, compare only their shapes.

    Raises:
        UserError: no adapter knows the model, or the parts do not add up to the model.
    """
    adapter = next((a for family, a in _ADAPTERS.items() if type(model) is family), None)
    if adapter is None:
        known = ", ".join(family.__name__ for family in _ADAPTERS)
        raise UserError(f"cannot split a {type(model).__name__}: supported families are {known}")
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        raise UserError(
            "this backbone has grad_checkpointing set, which has no effect when blocks run one by one: "
            "call set_grad_checkpointing(False) first"
        )
    pieces = adapter(model)
    _check_parameters(model, pieces)
    _check_output(model, pieces, image_size)
    return pieces


def _check_parameters(model: nn.Module, pieces: Decomposition) -> None:
    parts = [pieces.stem, *pieces.blocks, pieces.tail]
    found = [id(p) for part in parts for p in part.parameters()]
    lost = [name for name, p in model.named_parameters() if found.count(id(p)) != 1]
    if lost:
        raise UserError(f"cannot split this {type(model).__name__}: {lost[0]} is not in exactly one part")


@torch.no_grad()
def _check_output(model: nn.Module, pieces: Decomposition, image_size: int) -> None:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, image_size, image_size, generator=generator).to(device)
    with evaluating(model):
        try:
            expected = model(image)
        except (AssertionError, RuntimeError) as error:
            raise UserError(f"this backbone cannot take images of {image_size} px: {error}") from error
        x = pieces.stem(image)
        pieces.shapes = [_shape(pieces, x)]
        for block in pieces.blocks:
            x = block(x)
            pieces.shapes.append(_shape(pieces, x))
        logits = pieces.tail(x)
        same = logits.shape == expected.shape if device.type == "meta" else torch.equal(logits, expected)
        if not same:
            raise UserError(f"cannot split this {type(model).__name__}: its parts give different logits from the whole")


def _shape(pieces: Decomposition, x: Tensor) -> FeatureShape:
    return FeatureShape.of(x, pieces.layout, prefix_tokens=pieces.prefix_tokens, grid=pieces.grid)

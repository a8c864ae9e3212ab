"""Decomposition: the parts equal the plain timm model exactly, with every parameter in one part."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from localfeat.backbones import decompose as blocks_module
from localfeat.backbones.decompose import decompose
from localfeat.backbones.layout import FeatureShape
from localfeat.backbones.timm_models import image_size_of
from localfeat.learner.assembly import build_local_modules
from localfeat.methods.parts.decoders import OneLayerDecoder
from localfeat.methods.registry import METHODS
from localfeat.utils.errors import UserError
from tests.helpers.small import CLASSES, FAMILIES, IMAGE_SIZE, backbone, batch, disturbed, gradients

DEPTHS = {name: [1, 1, 1, 1] for name in FAMILIES} | {"resnet": [2, 2, 2, 2]}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train with drop-path"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_give_the_models_output_and_gradients_exactly(family: str, training: bool) -> None:
    plain = disturbed(backbone(family, drop_path_rate=0.3))
    split = copy.deepcopy(plain)
    parts = decompose(split, IMAGE_SIZE)
    plain.train(training)
    split.train(training)
    images, labels = batch(6)
    results = []
    for function in (plain, parts):
        torch.manual_seed(7)
        logits = function(images)
        nn.functional.cross_entropy(logits, labels).backward()
        results.append(logits.detach())
    assert torch.equal(*results)
    expected, actual = gradients(plain), gradients(split)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert sum(g.abs().max() > 0 for g in expected.values()) >= 0.9 * len(expected)


def test_drop_path_makes_a_difference() -> None:
    """Check that training mode drops something, or the comparison above would mean little."""
    network = backbone("swin", drop_path_rate=0.3).train()
    images, _ = batch()
    assert not torch.equal(network(images), network(images))


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_and_shapes(family: str) -> None:
    network = backbone(family)
    parts = decompose(network, IMAGE_SIZE)
    assert parts.stage_depths == DEPTHS[family]
    assert len(parts.blocks) == sum(parts.stage_depths) == len(parts.shapes) - 1
    images, _ = batch(2)
    x = parts.stem.eval()(images)
    for block, shape in zip([*parts.blocks, None], parts.shapes, strict=True):
        maps = shape.to_nchw(x)
        assert maps.shape == (2, shape.channels, shape.height, shape.width)
        assert shape.to_nhwc(x).shape == (2, shape.height, shape.width, shape.channels)
        x = x if block is None else block.eval()(x)


def test_prefix_tokens_are_left_out_of_the_maps() -> None:
    parts = decompose(backbone("vit_registers"), IMAGE_SIZE)
    assert parts.shapes[0] == FeatureShape("NLC", 32, 4, 4, prefix_tokens=5)
    tokens = torch.arange(21.0).view(1, 21, 1).expand(1, 21, 32)
    assert parts.shapes[0].to_nchw(tokens)[0, 0].flatten().tolist() == list(range(5, 21))


@pytest.mark.parametrize("split", [1, 2, 4, [1], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_exactly_one_local_module(family: str, split: int | list[int]) -> None:
    network = backbone(family)
    modules = build_local_modules(network, METHODS["feature_recon"], split, OneLayerDecoder)
    owners = [id(p) for module in modules for p in module.parameters()]
    assert len(owners) == len(set(owners))
    assert {id(p) for p in network.parameters()} <= set(owners)
    first = split[0] if isinstance(split, list) else sum(DEPTHS[family]) // split
    assert len(modules[0].blocks) == first
    assert [module.stem is not None for module in modules] == [True] + [False] * (len(modules) - 1)


def test_decomposing_disturbs_nothing() -> None:
    network = backbone("resnet").train()
    before = copy.deepcopy(network.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    decompose(network, IMAGE_SIZE)
    assert torch.rand(()) == expected
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "mlp_mixer", "efficientnet_b0"])
def test_unknown_families_are_refused_in_one_line(name: str) -> None:
    name = {"mlp_mixer": "mixer_s32_224"}.get(name, name)
    network = timm.create_model(name, num_classes=CLASSES)
    with pytest.raises(
        UserError, match=rf"^cannot split a {type(network).__name__}: supported families are Swin"
    ) as error:
        decompose(network, 224)
    assert "\n" not in str(error.value)


def test_a_wrong_adapter_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = blocks_module._ADAPTERS[timm.models.VisionTransformer]

    def without_norm(model: nn.Module) -> blocks_module.Decomposition:
        parts = right(model)
        parts.tail = blocks_module.Part(model, ["norm", "head"], lambda m, x: m.forward_head(x))
        return parts

    def without_head(model: nn.Module) -> blocks_module.Decomposition:
        parts = right(model)
        parts.tail = blocks_module.Part(model, ["norm"], lambda m, x: m.forward_head(m.norm(x)))
        return parts

    monkeypatch.setitem(blocks_module._ADAPTERS, timm.models.VisionTransformer, without_norm)
    with pytest.raises(UserError, match="different logits from the whole"):
        decompose(backbone("vit"), IMAGE_SIZE)
    monkeypatch.setitem(blocks_module._ADAPTERS, timm.models.VisionTransformer, without_head)
    with pytest.raises(UserError, match=r"head\.weight is not in exactly one part"):
        decompose(backbone("vit"), IMAGE_SIZE)


def test_image_size_is_read_off_the_model() -> None:
    assert image_size_of(backbone("swin")) == image_size_of(backbone("convnext")) == IMAGE_SIZE
    assert image_size_of(timm.create_model("vit_tiny_patch16_224", img_size=64)) == 64
    with pytest.raises(UserError, match="32 x 64 images: only square ones"):
        image_size_of(timm.create_model("vit_tiny_patch16_224", img_size=(32, 64)))

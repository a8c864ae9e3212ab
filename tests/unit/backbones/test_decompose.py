"""Decomposition: the parts equal the plain timm model exactly, with every parameter in one part."""

from __future__ import annotations

import copy
import pickle
import random
import re
from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor, nn

from localfeat.backbones import decompose as decompose_module
from localfeat.backbones.decompose import decompose
from localfeat.backbones.layout import FeatureShape
from localfeat.backbones.parts import Part
from localfeat.backbones.timm_models import build_backbone, image_size_of
from localfeat.learner.assembly import build_local_modules
from localfeat.methods.parts.decoders import OneLayerDecoder
from localfeat.methods.registry import METHODS
from localfeat.utils.errors import UserError
from localfeat.utils.sizes import sides
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


OTHERS: dict[str, tuple[str, dict[str, Any], list[int], str]] = {  # name, arguments, stages, layout of the last map
    "class tokens enter late": ("cait_xxs24_224", {"depth": 3, "embed_dim": 16, "num_heads": 2}, [1, 1, 1], "NLC"),
    "rotary tables": ("eva02_tiny_patch14_224", {"depth": 3, "embed_dim": 48, "num_heads": 2}, [1, 1, 1], "NLC"),
    "sizes as arguments": ("xcit_nano_12_p16_224", {"depth": 3, "embed_dim": 16}, [1, 1, 1], "NLC"),
    "tokens without a class": ("mixer_s32_224", {"mlp_ratio": (0.1, 0.1)}, [1] * 8, "NLC"),
    "blocks by number": ("efficientnet_b0", {}, [1, 2, 2, 3, 3, 4, 1], "NCHW"),
    "another graph in training": ("ghostnet_050", {}, [1, 1, 1, 1, 1, 1, 5, 1, 4], "NCHW"),
    "odd sizes": ("levit_128s", {}, [2, 3, 4], "NLC"),
    "layers without blocks": ("vgg11", {"mlp_ratio": 0.01}, [1, 2, 2, 2], "NCHW"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_networks_of_every_kind_are_cut_exactly(case: str) -> None:
    name, arguments, stages, layout = OTHERS[case]
    torch.manual_seed(0)
    plain = disturbed(timm.create_model(name, num_classes=CLASSES, **arguments))
    split = copy.deepcopy(plain)
    parts = decompose(split, 224)
    assert (parts.stage_depths, parts.shapes[-1].layout) == (stages, layout)
    images = torch.randn(2, 3, 224, 224)
    for training in (False, True):
        plain.train(training)
        parts.train(training)
        results = []
        for function in (plain, parts):
            torch.manual_seed(7)
            logits = function(images)
            logits.square().sum().backward()
            results.append(logits.detach())
        assert torch.equal(*results)
    expected = gradients(plain)
    assert all(torch.equal(found, expected[key]) for key, found in gradients(split).items())
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), split.buffers(), strict=True))


def test_parts_survive_copies_pickles_and_the_loss_of_the_backbone() -> None:
    network = timm.create_model("eva02_tiny_patch14_224", num_classes=CLASSES, depth=2, embed_dim=48, num_heads=2)
    parts = decompose(network.eval(), 224)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = network(images)
        del network
        for again in (copy.deepcopy(parts), pickle.loads(pickle.dumps(parts)), parts):
            assert torch.equal(again(images), expected)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "size"),
    [("eva02_tiny_patch14_224", 224), ("xcit_nano_12_p16_224", 64), ("ghostnet_050", 64), ("pvt_v2_b0", 64)],
)
def test_parts_compile_as_one_graph(name: str, size: int, training: bool) -> None:
    torch._dynamo.reset()
    network = build_backbone(name, CLASSES, image_size=size)
    pieces = decompose(network, size).train(training)
    x = torch.randn(2, 3, size, size)
    for part in (pieces.stem, *pieces.blocks[:2]):
        compiled = torch.compile(copy.deepcopy(part), backend="eager", fullgraph=True)
        given = []
        for function in (part, compiled):
            torch.manual_seed(1)
            given.append(function(x))
        torch.testing.assert_close(*given)
        x = given[0].detach()


@pytest.mark.parametrize(("size", "channels"), [((64, 96), 1), ((32, 64), 13), (32, 4)])
@pytest.mark.parametrize("family", ["vit", "convnext", "resnet"])
def test_images_of_any_shape(family: str, size: Any, channels: int) -> None:
    name, arguments = FAMILIES[family]
    network = build_backbone(name, CLASSES, image_size=size, arguments={**arguments, "in_chans": channels}).eval()
    parts = decompose(network, size)
    height, width = sides(size)
    first = parts.shapes[0]
    assert first.height * width == first.width * height
    images = torch.randn(2, channels, height, width)
    with torch.no_grad():
        assert torch.equal(parts(images), network(images))


KEYS = {  # the first of the stem, of the second stage's first block, and of the tail: they stand in checkpoints
    "swin": ("proj.weight", "0.norm.weight", "norm.weight"),
    "swinv2": ("proj.weight", "0.reduction.weight", "norm.weight"),
    "vit": ("cls_token", "norm1.weight", "norm.weight"),
    "convnext": ("0.weight", "0.0.weight", "head.norm.weight"),
    "resnet": ("conv1.weight", "conv1.weight", "fc.weight"),
}


@pytest.mark.parametrize("family", KEYS)
def test_names_in_checkpoints_stay(family: str) -> None:
    parts = decompose(backbone(family), IMAGE_SIZE)
    second = parts.blocks[parts.stage_depths[0]]
    assert tuple(next(iter(part.state_dict())) for part in (parts.stem, second, parts.tail)) == KEYS[family]


def test_downsampling_goes_with_the_next_block_or_the_previous() -> None:
    following, previous = (decompose(backbone("swin"), IMAGE_SIZE, downsample=d) for d in ("next", "previous"))
    assert [shape.height for shape in following.shapes] == [16, 16, 8, 4, 2]
    assert [shape.height for shape in previous.shapes] == [16, 8, 4, 2, 2]
    assert following.stage_depths == previous.stage_depths == [1, 1, 1, 1]
    columnar = decompose(backbone("vit"), IMAGE_SIZE, downsample="previous")
    assert columnar.shapes == decompose(backbone("vit"), IMAGE_SIZE).shapes


def test_blocks_by_a_pattern() -> None:
    network = Own()
    with pytest.raises(UserError, match=r"^cannot split this Own: no blocks are found in it; name them: localfeat"):
        decompose(network, 32)
    parts = decompose(network, 32, blocks=r"step_\d")
    assert len(parts.blocks) == 2 and isinstance(parts.blocks[0], Part)  # its addition needs its input
    assert parts.blocks[1] is network.step_2
    assert [(s.channels, s.height) for s in parts.shapes] == [(4, 16), (4, 16), (4, 16)]
    with pytest.raises(UserError, match=r"^blocks='step': no module has a name .* as a whole; it has first, step_1, "):
        decompose(network, 32, blocks="step")
    with pytest.raises(UserError, match=r"^blocks='step\(' is no regular expression: "):
        decompose(network, 32, blocks="step(")


class Own(nn.Module):
    """A network of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.step_1 = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.step_2 = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.last = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return cast(Tensor, self.last(self.step_2(self.step_1(x) + x).mean((2, 3))))


class InPlace(Own):
    """Its second step changes what the first gave."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.step_1(self.first(images))
        x += 1
        return cast(Tensor, self.last(self.step_2(x).mean((2, 3))))


def test_no_cut_lies_before_a_change_in_place() -> None:
    network = InPlace().eval()
    parts = decompose(network, 32, blocks=r"step_\d")
    x = torch.randn(1, 4, 16, 16)
    expected = network.step_1(x) + 1
    assert torch.equal(parts.blocks[0](x), expected) and parts.blocks[1] is network.step_2


class TwoWays(Own):
    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return cast(Tensor, self.last((self.step_2(x) + self.step_1(x)).mean((2, 3))))


class Shared(Own):
    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.step_2(self.step_1(self.step_2(self.first(images)))).mean((2, 3))))


@pytest.mark.parametrize("kind", [TwoWays, Shared])
def test_blocks_that_cannot_be_parted_are_one(kind: type[nn.Module]) -> None:
    assert len(decompose(kind(), 32, blocks=r"step_\d").blocks) == 1


class TwoStreams(Own):
    def __init__(self) -> None:
        super().__init__()
        self.step_1 = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return cast(
            Tensor, self.last((self.first(images) + self.step_2(self.step_1(images[:, :, ::2, ::2]))).mean((2, 3)))
        )


class Unregistered(Own):
    def __init__(self) -> None:
        super().__init__()
        self.offsets = [torch.ones(1)]

    def forward(self, images: Tensor) -> Tensor:
        x = self.step_1(self.first(images)) + self.offsets[0]
        return cast(Tensor, self.last(self.step_2(x).mean((2, 3))))


class Rolled(Own):
    """Its features lie elsewhere than in the image."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images).roll((8, 8), (2, 3))
        return cast(Tensor, self.last(self.step_2(self.step_1(x)).mean((2, 3))))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (TwoStreams, "no two places are found in it at which a single feature map is alive"),
        (Unregistered, "it uses a tensor that is no parameter or buffer"),
        (Rolled, "its features do not lie where they are in the image, as decoders need"),
    ],
)
def test_what_cannot_be_cut_says_why(kind: type[nn.Module], reason: str) -> None:
    with pytest.raises(UserError, match=rf"^cannot split this {kind.__name__}: {reason}$"):
        decompose(kind(), 32, blocks=r"step_\d")


class Branches(Own):
    def forward(self, images: Tensor) -> Tensor:
        x = self.step_1(self.first(images))
        return cast(Tensor, self.last(self.step_2(x * 5 if x.mean() > 0 else x).mean((2, 3))))


class ReadsBuffer(Own):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        x = self.step_1(self.first(images)) * float(self.get_buffer("factor"))
        return cast(Tensor, self.last(self.step_2(x).mean((2, 3))))


class DropsLayers(Own):
    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        if random.random() > -1:
            x = self.step_1(x)
        return cast(Tensor, self.last(self.step_2(x).mean((2, 3))))


class Ungrateful(Own):
    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.step_1(self.first(images))
        return cast(Tensor, self.last(self.step_2(x).mean((2, 3))))


class Counts(Own):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, images: Tensor) -> Tensor:
        x = self.step_1(self.first(images))
        if self.training:
            self.get_buffer("mean").lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return cast(Tensor, self.last(self.step_2(x).mean((2, 3))))


class DropsChannels(Own):
    def forward(self, images: Tensor) -> Tensor:
        x = self.step_1(self.first(images)).clone()
        if self.training:
            x[:, 0].mul_(0)
        return cast(Tensor, self.last(self.step_2(x).mean((2, 3))))


class Four(Own):
    def forward(self, images: Tensor) -> Tensor:
        x = torch.cat([part - part.mean() for part in self.step_1(self.first(images)).split(4)])
        return cast(Tensor, self.last(self.step_2(x).mean((2, 3))))


class WithoutAutocast(Own):
    def forward(self, images: Tensor) -> Tensor:
        x = self.step_1(self.first(images))
        with torch.autocast("cpu", enabled=False):
            x = torch.einsum("bchw,cd->bdhw", x.float(), torch.full((4, 4), 0.3))
        return cast(Tensor, self.last(self.step_2(x).mean((2, 3))))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Branches, "its own code reads values of a tensor, as branches on them do: move that into a module"),
        (ReadsBuffer, "its own code reads values of a tensor, as branches on them do: move that into a module"),
        (DropsLayers, "it draws from Python's random numbers; torch's can be cut"),
        (Ungrateful, "its parts give another gradient in evaluation; what it does between its blocks "),
        (Counts, "its parts give another buffer in training; "),
        (DropsChannels, "its parts give another output in training; "),
        (Four, "its parts give another output in evaluation; "),
        (WithoutAutocast, "its parts give another output under autocast; "),
    ],
)
def test_what_parts_would_do_differently_is_refused(kind: type[nn.Module], reason: str) -> None:
    network = kind()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError, match=rf"^cannot split this {kind.__name__}: {re.escape(reason)}"):
        decompose(network, 32, blocks=r"step_\d")
    assert network.training and all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Dropping(Own):
    """Its setting is private."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.dropout(self.step_1(self.first(images)), self._share, self.training)
        return cast(Tensor, self.last(self.step_2(x).mean((2, 3))))


def test_networks_that_only_look_alike_are_not_taken_for_each_other() -> None:
    images = torch.randn(4, 3, 32, 32)
    for share in (0.1, 0.9):
        network = Dropping(share)
        pieces = decompose(network, 32, blocks=r"step_\d")
        given = []
        for function in (network, pieces):
            torch.manual_seed(3)
            given.append(function(images))
        assert torch.equal(*given)


def test_tokens_out_of_order_are_refused() -> None:
    with pytest.raises(UserError, match=r"^cannot split this Hiera: its features do not lie where they are"):
        decompose(timm.create_model("hiera_tiny_224", num_classes=CLASSES), 224)


def test_a_second_time_takes_no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    decompose(backbone("swin"), IMAGE_SIZE)
    monkeypatch.setattr(decompose_module, "record", None)
    decompose(backbone("swin", seed=1), IMAGE_SIZE)
    with pytest.raises(UserError):
        decompose(backbone("swin", depths=(1, 1, 2, 1)), IMAGE_SIZE)


def test_a_wrong_part_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decompose_module.build_part

    def without(what: str) -> Any:
        def build(model: nn.Module, spans: Any, **how: bool) -> nn.Module:
            part = right(model, spans, **how)
            if hasattr(part, what):
                setattr(part, what, nn.Identity())
            return part

        return build

    monkeypatch.setattr(decompose_module, "build_part", without("patch_drop"))
    decompose(backbone("vit"), IMAGE_SIZE)
    monkeypatch.setattr(decompose_module, "build_part", without("pos_drop"))
    network = backbone("vit")
    network.pos_drop = nn.Softmax(-1)
    with pytest.raises(UserError, match="different logits from the whole"):
        decompose(network, IMAGE_SIZE)
    monkeypatch.setattr(decompose_module, "build_part", without("head"))
    with pytest.raises(UserError, match=r"head\.weight is not in exactly one part"):
        decompose(backbone("vit"), IMAGE_SIZE)


def test_image_size_is_read_off_the_model() -> None:
    assert image_size_of(backbone("swin")) == image_size_of(backbone("convnext")) == (IMAGE_SIZE, IMAGE_SIZE)
    assert image_size_of(timm.create_model("vit_tiny_patch16_224", img_size=64)) == (64, 64)
    assert image_size_of(timm.create_model("vit_tiny_patch16_224", img_size=(32, 64))) == (32, 64)

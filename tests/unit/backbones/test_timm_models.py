"""Building backbones: timm's failures become one line."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from localfeat.backbones.timm_models import build_backbone, image_size_of
from localfeat.utils.errors import UserError
from tests.helpers.small import CLASSES, FAMILIES, backbone, batch


def refused(name: str, **arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        build_backbone(name, CLASSES, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_is_the_timm_model_of_the_same_arguments(family: str) -> None:
    name, arguments = FAMILIES[family]
    sized = {} if family in ("convnext", "resnet") else {"img_size": 32}
    ours = backbone(family, seed=3)
    torch.manual_seed(3)
    theirs = timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.0, **sized, **arguments)
    images, _ = batch(2)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_drop_path_rate_reaches_the_blocks() -> None:
    rates = [block.drop_path1.drop_prob for block in backbone("vit", drop_path_rate=0.3).blocks[1:]]
    assert rates == pytest.approx([0.1, 0.2, 0.3])


def test_unknown_model_and_unknown_argument() -> None:
    assert refused("swin_tinny").startswith("backbone.name=swin_tinny: timm has no such model")
    assert "embed_dims" in refused("vit_tiny_patch16_224", arguments={"embed_dims": 3})
    assert "depths" in refused("vit_tiny_patch16_224", arguments={"depths": (1, 1)})


@pytest.mark.parametrize("size", [30, 48, 100])
def test_sizes_that_windows_cannot_take_are_refused_with_sizes_that_work(size: int) -> None:
    name, arguments = FAMILIES["swin"]
    message = refused(name, image_size=size, arguments=arguments)
    assert message.startswith(f"image_size={size}: patches of 2 px and windows of 4 over 4 stages cannot tile it")
    works = [int(number) for number in message.rsplit("sizes that work: ")[1].split(", ")]
    for good in works:
        network = build_backbone(name, CLASSES, image_size=good, arguments=arguments)
        assert network(torch.randn(1, 3, good, good)).shape == (1, CLASSES)


def test_swin_tiny_takes_224_but_not_200_pixels() -> None:
    assert "sizes that work: 224" in refused("swin_tiny_patch4_window7_224", image_size=230)
    assert build_backbone("swin_tiny_patch4_window7_224", 10, image_size=224).num_classes == 10


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", _no_network)
    message = refused("vit_tiny_patch16_224", pretrained=True)
    assert "the weights of vit_tiny_patch16_224 cannot be downloaded" in message
    assert "backbone.weights=" in message


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network")


def test_a_swin_v2_is_held_to_its_windows_too() -> None:
    line = refused("swinv2_tiny_window8_256", image_size=100)
    assert line.startswith("image_size=100: ") and line.endswith("sizes that work: 64, 128")
    assert build_backbone("swinv2_tiny_window8_256", 3, image_size=64).patch_embed.img_size == (64, 64)


def test_sizes_at_which_a_stage_is_one_window_work() -> None:
    line = refused("swin_tiny_patch4_window7_224", image_size=40, arguments={"window_size": 4, "patch_size": 2})
    assert line.endswith("sizes that work: 32, 64")


def test_image_size_is_the_backbones_own_where_it_has_one() -> None:
    swin = build_backbone("swin_tiny_patch4_window7_224", 3)
    assert (image_size_of(swin), image_size_of(swin, 224)) == ((224, 224), (224, 224))
    with pytest.raises(UserError, match="image_size=64: this backbone was built for 224 px"):
        image_size_of(swin, 64)
    convnext = build_backbone("convnext_atto", 3)
    assert (image_size_of(convnext), image_size_of(convnext, [64, 96])) == ((224, 224), (64, 96))

"""Exported backbones load with plain timm and give the same logits; wrong files are refused in one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from localfeat.run.export import build_backbone, export_backbone, read_backbone_file
from localfeat.run.weights import load_backbone_weights
from localfeat.utils.errors import UserError

ARGUMENTS = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "patch_size": 2}
NAME = "swin_tiny_patch4_window7_224"


def micro_swin(num_classes: int = 10, seed: int = 0, img_size: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(NAME, num_classes=num_classes, img_size=img_size, **ARGUMENTS).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_exported_file_has_timms_keys_and_builds_the_same_model(tmp_path: Path, images: torch.Tensor) -> None:
    model = micro_swin()
    path = tmp_path / "backbone.safetensors"
    written = export_backbone(model, path, arguments=ARGUMENTS, mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    assert load_file(path).keys() == model.state_dict().keys()
    assert read_backbone_file(path) == written
    assert (written.architecture, written.num_classes, written.img_size) == (NAME, 10, 16)
    assert written.mean == (0.1, 0.2, 0.3) and written.arguments["depths"] == [1, 1]
    assert torch.equal(build_backbone(path).eval()(images), model(images))
    with_timm = timm.create_model(NAME, num_classes=10, img_size=16, checkpoint_path=str(path), **ARGUMENTS).eval()
    assert torch.equal(with_timm(images), model(images))


def test_normalisation_is_the_models_own_unless_given(tmp_path: Path) -> None:
    written = export_backbone(micro_swin(), tmp_path / "a.safetensors", arguments=ARGUMENTS)
    assert written.mean == pytest.approx((0.485, 0.456, 0.406))


def test_shared_transposed_and_sliced_tensors_are_written(tmp_path: Path) -> None:
    class Odd(nn.Module):
        num_classes = 2

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.arange(6.0).view(2, 3).t())
            self.b = self.a
            self.register_buffer("c", torch.arange(10.0)[2:4])

    odd = Odd()
    with pytest.raises(UserError, match="architecture="):
        export_backbone(odd, tmp_path / "odd.safetensors")
    export_backbone(odd, tmp_path / "odd.safetensors", architecture="odd")
    state = load_file(tmp_path / "odd.safetensors")
    assert all(torch.equal(state[key], value) for key, value in odd.state_dict().items())


@pytest.mark.parametrize("nesting", [None, "state_dict", "model"])
def test_torch_files_plain_or_nested_load(tmp_path: Path, nesting: str | None) -> None:
    source, target = micro_swin(seed=1), micro_swin(seed=2)
    state = source.state_dict()
    torch.save({nesting: state, "epoch": 3} if nesting else state, tmp_path / "w.pth")
    load_backbone_weights(target, tmp_path / "w.pth")
    assert all(torch.equal(value, state[key]) for key, value in target.state_dict().items())


def test_another_class_count_is_refused_unless_the_classifier_is_to_be_fresh(tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    source, target = micro_swin(10, seed=1), micro_swin(100, seed=2)
    export_backbone(source, path, arguments=ARGUMENTS)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(UserError, match=r"classifies 10 classes, the model 100: .*reset_classifier=True"):
        load_backbone_weights(target, path)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items()), "all or nothing"
    load_backbone_weights(target, path, reset_classifier=True)
    for key, value in target.state_dict().items():
        expected = before[key] if key.startswith("head.fc.") else source.state_dict()[key]
        assert torch.equal(value, expected), key


def test_other_keys_are_named(tmp_path: Path) -> None:
    state = dict(micro_swin().state_dict())
    del state["norm.bias"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match=r"lacks norm\.bias: "):
        load_backbone_weights(micro_swin(), tmp_path / "short.safetensors")
    more = {**micro_swin().state_dict(), **{f"extra.{n}": torch.zeros(1) for n in range(5)}}
    save_file(more, tmp_path / "long.safetensors")
    with pytest.raises(UserError, match=r"unknown extra\.0, extra\.1, extra\.2 and 2 more"):
        load_backbone_weights(micro_swin(), tmp_path / "long.safetensors")


def test_other_shapes_are_named(tmp_path: Path) -> None:
    state = {**micro_swin().state_dict(), "patch_embed.norm.weight": torch.zeros(9)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"patch_embed\.norm\.weight of shape \[9\], the model \[8\]"):
        load_backbone_weights(micro_swin(), tmp_path / "w.safetensors")


class Bomb:
    """An object whose unpickling would call print."""

    def __reduce__(self) -> tuple:
        return print, ("executed",)


def test_a_pickle_that_needs_code_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pth", "bomb.pkl"):
        with pytest.raises(UserError, match="refused") as caught:
            load_backbone_weights(micro_swin(), tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content"), [("a.safetensors", b"no"), ("a.pth", b""), ("b.pth", b"text\n"), ("c.pth", None)]
)
def test_what_are_no_weights_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_backbone_weights(micro_swin(), tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_files_without_our_metadata_are_refused_for_building(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="does not name its architecture"):
        build_backbone(tmp_path / "a.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="not a safetensors file"):
        build_backbone(tmp_path / "a.pth")

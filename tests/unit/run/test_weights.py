"""Initial weights from files of any usual form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from localfeat import Learner
from localfeat.backbones.split import Split
from localfeat.run.weights import load_backbone_weights
from localfeat.utils.errors import UserError
from tests.unit.run.test_export import micro_swin

State = dict[str, Tensor]


def official(state: Mapping[str, Tensor]) -> State:
    """Return timm's Swin weights as their authors publish them: downsampling ends a stage, the classifier is head."""
    result: State = {"layers.0.blocks.1.attn_mask": torch.zeros(4, 4, 4)}
    for key, value in state.items():
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        result[key.replace("head.fc.", "head.")] = value
    return result


def under(prefix: str) -> Callable[[State], State]:
    return lambda state: {f"{prefix}{key}": value for key, value in state.items()}


def bodies(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith("head.")}


FORMS: dict[str, tuple[Callable[[State], Any], list[str]]] = {
    "plain": (lambda state: state, []),
    "DDP": (lambda state: {"state_dict": under("module.")(state)}, ["under state_dict", "prefix module. removed"]),
    "compiled": (under("_orig_mod."), ["prefix _orig_mod. removed"]),
    "compiled DDP": (under("module._orig_mod."), ["prefix _orig_mod. removed", "prefix module. removed"]),
    "compiled parts": (
        lambda state: {key.replace(".attn.", "._orig_mod.attn."): value for key, value in state.items()},
        ["prefix _orig_mod. removed"],
    ),
    "Lightning": (
        lambda state: {"state_dict": {**under("net.")(state), "loss.scale": torch.ones(1)}, "epoch": 3},
        ["under state_dict", "prefix net. removed", "entries without it left out: 1"],
    ),
    "averaged": (
        lambda state: {"state_dict": under("x.")(state), "state_dict_ema": state},
        ["under state_dict_ema"],
    ),
    "model_ema": (lambda state: {"model_ema": state}, ["under model_ema"]),
    "model_state_dict": (lambda state: {"model_state_dict": state, "epoch": 3}, ["under model_state_dict"]),
    "nested twice": (lambda state: {"model": {"state_dict": state}}, ["under model", "under state_dict"]),
    "masked modelling": (  # SimMIM, MAE
        lambda state: {"model": {**under("encoder.")(state), "decoder.0.weight": torch.ones(1)}},
        ["under model", "prefix encoder. removed", "entries without it left out: 1"],
    ),
    "the authors'": (lambda state: {"model": official(state)}, ["under model", "converted by timm"]),
}


def same(model: nn.Module, state: Mapping[str, Tensor], *, apart: str = "nothing") -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if not key.startswith(apart))


@pytest.mark.parametrize("form", FORMS)
def test_every_usual_form_is_loaded_and_said(form: str, tmp_path: Path) -> None:
    write, notes = FORMS[form]
    state = micro_swin(seed=1).state_dict()
    torch.save(write(state), tmp_path / "w=1.pth")
    model = micro_swin(seed=2)
    assert load_backbone_weights(model, tmp_path / "w=1.pth") == notes
    assert same(model, state)


def test_the_format_is_told_by_content(tmp_path: Path) -> None:
    state = {key: value.contiguous() for key, value in micro_swin(seed=1).state_dict().items()}
    save_file(state, tmp_path / "model.bin")
    torch.save(state, tmp_path / "model.safetensors")
    for name in ("model.bin", "model.safetensors"):
        model = micro_swin(seed=2)
        load_backbone_weights(model, tmp_path / name)
        assert same(model, state)


def test_position_tables_are_resampled_as_timm_does(tmp_path: Path) -> None:
    small = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 3}
    torch.save(timm.create_model("vit_tiny_patch16_224", **small).state_dict(), tmp_path / "w.pth")
    expected = timm.create_model("vit_tiny_patch16_224", img_size=96, **small)
    timm.models.load_checkpoint(
        expected, str(tmp_path / "w.pth"), filter_fn=timm.models.vision_transformer.checkpoint_filter_fn
    )
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, **small)
    assert load_backbone_weights(model, tmp_path / "w.pth") == ["converted by timm"]
    assert same(model, expected.state_dict())


@pytest.mark.parametrize("split", [1, 2, Split(2, downsample="previous")], ids=str)
def test_a_run_s_own_checkpoint_is_loaded(split: int | Split, tmp_path: Path) -> None:
    source = micro_swin(seed=1)
    learner = Learner(source, "e2e" if split == 1 else "feature_recon", split)
    torch.save({"state_dict": learner.state_dict(), "epoch": 1}, tmp_path / "best.ckpt")
    model = micro_swin(100, seed=2)
    notes = load_backbone_weights(model, tmp_path / "best.ckpt", reset_classifier=True)
    assert notes == ["under state_dict", "the backbone of a localfeat checkpoint", "its classifier is left out"]
    assert same(model, source.state_dict(), apart="head.")


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["state_dict"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        load_backbone_weights(micro_swin(), tmp_path / "w.pth")


def test_a_whole_model_is_refused_for_its_reason(tmp_path: Path) -> None:
    """``torch.save(model)``, timm 1228: only Python code can read it."""
    torch.save(micro_swin(), tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"w\.pth needs code to be unpickled, which is refused: save a plain state dict"
    ):
        load_backbone_weights(micro_swin(), tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: {**state, "norm.bias": state["norm.bias"] * float("nan")}, "norm.bias holds values that are no"),
        (lambda state: {**under("student.")(state), **under("teacher.")(state)}, "holds this network under student"),
        (lambda state: {"student": state, "teacher": state}, "holds no state dict"),
        (lambda state: {**under("student.")(bodies(state)), **under("teacher.")(state)}, "holds this network under"),
        (lambda state: {key: (100 * value).short() for key, value in state.items()}, "holds int16, the model floats"),
        (lambda state: {**state, "norm.bias": state["norm.bias"].double() + 1e300}, "holds values that are not finite"),
        (lambda state: {**state, "a." * 100_000: torch.zeros(1)}, "has unknown"),
        (lambda state: {f"b{key}": value for key, value in state.items()}, "lacks "),
    ],
)
def test_what_does_not_fit_changes_nothing(change: Callable[[State], Any], reason: str, tmp_path: Path) -> None:
    model = micro_swin(seed=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(change(micro_swin(seed=1).state_dict()), tmp_path / "w.pth")
    with pytest.raises(UserError, match=reason):
        load_backbone_weights(model, tmp_path / "w.pth")
    assert same(model, before)

"""Weights files, backbone names and arguments from somebody else: nothing runs, no download starts, no other file is
read; each is refused in one line."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from localfeat.backbones.timm_models import build_backbone as backbone_of
from localfeat.backbones.timm_models import model_name
from localfeat.run.export import build_backbone, read_backbone_file
from localfeat.run.weights import load_backbone_weights, read_state
from localfeat.utils.errors import UserError
from tests.helpers.hostile import PICKLES, bare_pickle, refused, script, unpacks_to_much, watched
from tests.helpers.whole_runs import SMALL, TINY_SWIN, files_below


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the file of :func:`tests.helpers.hostile.watched`."""
    with watched(tmp_path, monkeypatch) as path:
        yield path


@pytest.mark.parametrize("write", [*PICKLES, script], ids=lambda write: write.__name__)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:`torch.jit")
def test_hostile_weights_are_not_run(
    write: Any, marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(Path("w.pth"))
    line = refused(monkeypatch, capsys, "run", *SMALL, "backbone.weights=w.pth")
    assert "w.pth" in line and not marker.exists() and not Path("outputs").exists()


def test_a_file_that_unpacks_to_much_is_not_unpacked(tmp_path: Path) -> None:
    unpacks_to_much(tmp_path / "w.pth")
    with pytest.raises(UserError, match="is a compressed archive"):
        read_state(tmp_path / "w.pth")


ODD_TENSORS = {
    "number": lambda: {1: torch.zeros(1)},
    "meta": lambda: {"a": torch.zeros(10**6, 10**6, device="meta")},
    "sparse": lambda: {"a": torch.zeros(3, 3).to_sparse()},
    "complex": lambda: {"a": torch.zeros(1, dtype=torch.complex64)},
    "no tensor": lambda: {"a": "b"},
    "nothing": dict,
    "list": lambda: [torch.zeros(1)],
    "escape": lambda: {"a\n\x1b[31m": torch.zeros(1)},
    "shared": lambda: {"a": torch.zeros(1).expand(10**6, 10**6)},
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_odd_tensors_are_refused(kind: str, tmp_path: Path) -> None:
    torch.save(ODD_TENSORS[kind](), tmp_path / "w.pth")
    reason = "not a plain tensor" if kind in ("meta", "sparse", "complex") else ""
    with pytest.raises(UserError, match=rf"w\.pth.*{reason}") as caught:
        load_backbone_weights(timm.create_model("test_vit", num_classes=2), tmp_path / "w.pth")
    assert str(caught.value).isprintable()


def safetensors_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


SAFETENSORS: dict[str, tuple[Any, bytes, int | None]] = {
    "length beyond the file": ({}, b"", 2**40),
    "length of all bits": ({}, b"", 2**64 - 1),
    "length 0": ({}, b"", 0),
    "no header": (b"", b"", 100),
    "no JSON": (b"{" * 2000, b"", None),
    "deep": (b'{"a":' * 5000 + b"}" * 5000, b"", None),
    "a list": ([], b"", None),
    "beyond the end": ({"a": entry(0, 400, [100])}, b"1234", None),
    "overlapping": ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, b"1234", None),
    "a hole": ({"a": entry(4, 8, [1])}, b"12345678", None),
    "backwards": ({"a": entry(4, 0, [1])}, b"1234", None),
    "negative": ({"a": entry(-4, 0, [1])}, b"1234", None),
    "shape of another size": ({"a": entry(0, 4, [2**62, 4])}, b"1234", None),
    "negative shape": ({"a": entry(0, 4, [-1])}, b"1234", None),
    "unknown dtype": ({"a": entry(0, 4, [1], "OBJ")}, b"1234", None),
    "bytes left over": ({"a": entry(0, 4, [1])}, b"12345678", None),
    "empty": ({}, b"", None),
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_hostile_safetensors_are_refused(kind: str, tmp_path: Path) -> None:
    header, data, length = SAFETENSORS[kind]
    file = tmp_path / "w.safetensors"
    safetensors_file(file, header, data, length)
    with pytest.raises(UserError, match=r"w\.safetensors"):
        read_state(file)
    for read in (read_backbone_file, build_backbone):
        with pytest.raises(UserError, match=r"w\.safetensors") as caught:
            read(file)
        assert str(caught.value).isprintable()


METADATA = {"architecture": "test_vit", "num_classes": "2", "img_size": "null", "arguments": "{}", "mean": "[]"}
HOSTILE_METADATA: dict[str, dict[str, str | None]] = {
    "hub": {"architecture": "hf-hub:timm/test_vit.r160_in1k"},
    "folder": {"architecture": "local-dir:here"},
    "alias": {"architecture": "hf_hub:timm/test_vit"},
    "tag": {"architecture": "test_vit.../../here"},
    "unknown": {"architecture": "test_vitt"},
    "pretrained": {"arguments": '{"pretrained": true}'},
    "checkpoint": {"arguments": '{"checkpoint_path": "here/w.pth"}'},
    "cfg": {"arguments": '{"pretrained_cfg": {"file": "here/w.pth"}}'},
    "url": {"arguments": '{"pretrained_cfg_overlay": {"url": "http://example.com/w.pth"}}'},
    "cache": {"arguments": '{"cache_dir": "here"}'},
    "classes": {"arguments": '{"num_classes": 3}'},
    "another argument": {"arguments": '{"nothing": 3}'},
    "many blocks": {"arguments": '{"depth": 1000000000}'},
    "negative": {"arguments": '{"depth": -1}'},
    "wide": {"arguments": '{"embed_dim": 1073741824}'},
    "list": {"arguments": "[]"},
    "deep": {"arguments": "[" * 10000},
    "no JSON": {"arguments": "{"},
    "class count": {"num_classes": '"many"'},
    "classes below": {"num_classes": "-5"},
    "many classes": {"num_classes": str(10**15)},
    "digits": {"num_classes": "9" * 5000},
    "size": {"img_size": "{}"},
    "mean": {"mean": '["a"]'},
    "missing": {"arguments": None},
}


@pytest.mark.parametrize("kind", HOSTILE_METADATA)
def test_hostile_metadata_build_nothing(kind: str, marker: Path) -> None:
    state = timm.create_model("test_vit", num_classes=2).state_dict()
    metadata = {**METADATA, "std": "[]", **HOSTILE_METADATA[kind]}
    save_file(state, "b.safetensors", {key: value for key, value in metadata.items() if value is not None})
    Path("here").mkdir()
    bare_pickle(Path("here/w.pth"))
    before = files_below(Path())
    with pytest.raises(UserError, match=r"b\.safetensors") as caught:
        build_backbone("b.safetensors")
    assert str(caught.value).isprintable() and not marker.exists() and files_below(Path()) == before


def test_metadata_of_our_own_build(tmp_path: Path) -> None:
    state = timm.create_model("test_vit", num_classes=2).state_dict()
    save_file(state, tmp_path / "b.safetensors", {**METADATA, "std": "[]"})
    built = build_backbone(tmp_path / "b.safetensors").state_dict()
    assert all(torch.equal(value, state[key]) for key, value in built.items())


# --- backbones from a configuration ---


@pytest.mark.parametrize("name", ["hf-hub:timm/test_vit", "local-dir:here", "test_vit.nothing", "test_vit.a/../b", ""])
def test_names_are_timms_own(name: str, marker: Path) -> None:
    for chosen in ({"name": name, "variants": {}}, {"name": "test_vit", "variants": {32: name}}):
        with pytest.raises(UserError, match="timm has no such model"):
            model_name(image_size=32, **chosen)  # type: ignore[arg-type]
    assert model_name("test_vit.r160_in1k", None) == "test_vit.r160_in1k"


@pytest.mark.parametrize(
    "arguments",
    [
        {"pretrained": True},
        {"checkpoint_path": "here/w.pth"},
        {"pretrained_cfg": {"url": "http://example.com/w.pth"}},
        {"pretrained_cfg_overlay": {"hf_hub_id": "timm/test_vit"}},
        {"pretrained_cfg_overlay": {"state_dict": {}}},
        {"pretrained_cfg_overlay": "x"},
        {"pretrained_strict": False},
        {"cache_dir": "here"},
        {"features_only": True},
    ],
    ids=repr,
)
def test_arguments_are_the_networks_own(arguments: dict[str, Any], marker: Path) -> None:
    with pytest.raises(UserError, match=r"^backbone\.arguments\."):
        backbone_of("test_vit", 2, arguments=arguments)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["hf-hub:timm/test_vit", "local-dir:."])
def test_the_command_line_reaches_no_network_unasked(
    name: str, marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [*TINY_SWIN, "trainer=cpu"]
    assert "no such model" in refused(monkeypatch, capsys, "run", *typed, f"backbone.name='{name}'")
    line = refused(monkeypatch, capsys, "run", *typed, "+backbone.arguments.checkpoint_path=w.pth")
    assert "checkpoint_path" in line and not marker.exists()

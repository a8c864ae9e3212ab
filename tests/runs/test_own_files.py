"""A user's own configuration files say only what they must."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localfeat.run.folder import RunFolder
from tests.helpers.command_line import call
from tests.helpers.whole_runs import SMALL

SHORT = [arguments for arguments in SMALL if not arguments.startswith(("backbone", "epochs"))] + ["epochs=1"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for group in ("backbone", "method"):
        (tmp_path / "my_conf" / group).mkdir(parents=True)
    return tmp_path / "my_conf"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Path:
    assert call(monkeypatch, "run", *SHORT, *arguments) == 0
    (folder,) = Path("outputs").glob("*/*")
    return folder


def test_a_backbone_file_with_only_a_name(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "backbone" / "mine.yaml").write_text("name: vit_tiny_patch16_224")
    folder = run(monkeypatch, "backbone=mine", "--config-dir", str(own), "image_size=32", "split=k2")
    saved = RunFolder(folder).read_config()["backbone"]
    assert saved == {
        **{"name": "vit_tiny_patch16_224", "label": None, "variants": {}, "pretrained": False, "weights": None},
        **{"drop_path_rate": None, "arguments": {}},
    }
    assert json.loads((folder / "summary.json").read_text())["backbone"] == "vit_tiny_patch16_224"


def test_a_method_file_is_named_by_its_file(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "method" / "mine.yaml").write_text("_target_: localfeat.HeadAndDecoder\nsupervision: cross_entropy\n")
    folder = run(monkeypatch, "method=mine", "--config-dir", str(own))
    assert folder.name.endswith("_digits_mine")
    assert RunFolder(folder).read_config()["method"]["name"] == "mine"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["method"], summary["backbone"]) == ("mine", "swin_micro")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet", "test_convnext", "resnet18"])
def test_any_model_of_a_known_family(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run(monkeypatch, "backbone=timm", f"backbone.name={name}", "image_size=32", "method=greedy_ce", "split=k2")
    assert RunFolder(folder).read_config()["backbone"]["name"] == name


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["backbone=timm"], "backbone.name has to be given: backbone.name=<value>"),
        (
            ["backbone.name=test_vit"],
            "takes no argument window_size: does it belong to another network? backbone=timm backbone.name=test_vit",
        ),
        (
            ["backbone=swin_base", "backbone.name=swin_small_patch4_window7_224"],
            "of another network; type backbone=timm backbone.name=swin_small_patch4_window7_224",
        ),
    ],
)
def test_a_name_beside_another_network_s_settings(
    arguments: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "run", *SHORT, *arguments) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1

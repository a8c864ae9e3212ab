"""Files from somebody else: a run's folder, a weights file, a configuration. Nothing in them runs, uses the network,
reads the environment or causes writes elsewhere; each is refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localfeat.run.folder import RunFolder
from localfeat.run.literal import LARGEST_BYTES, read_yaml
from localfeat.utils.errors import UserError
from tests.helpers.command_line import call
from tests.helpers.hostile import MODULE, PICKLES, refused, watched, zip_with_pickle
from tests.helpers.whole_runs import SMALL, draw_nothing, files_below


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a finished run."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        draw_nothing(patch)
        assert call(patch, "run", *SMALL, "epochs=1", "hydra.run.dir=run") == 0
    return folder / "run"


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the file of :func:`tests.helpers.hostile.watched`."""
    with watched(tmp_path, monkeypatch) as path:
        yield path


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """Copy the run, to be tampered with."""
    return Path(shutil.copytree(run, tmp_path / "copied"))


# --- a run's own files are read literally ---

ANCHORS = "a0: &a0 [x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
YAML = {
    "aliases": (ANCHORS, "is an alias"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, "more than 32 levels deep"),
    "huge": ("a: " + "x" * LARGEST_BYTES, "larger than 262,144 bytes"),
    "object": ("a: !!python/object/apply:os.mkdir [it_ran]", "could not determine a constructor"),
    "name": ("a: !!python/name:os.mkdir", "could not determine a constructor"),
    "path": ("a: !!python/object/apply:pathlib.Path [x]", "could not determine a constructor"),
    "binary": ("a: !!binary aGVsbG8=", "could not determine a constructor"),
    "number": (f"a: 0x{'f' * 5000}", "Exceeds the limit (4300 digits)"),
    "digits": (f"a: {'9' * 5000}", ""),
    "bool": ("a: !!bool perhaps", ""),
    "twice": ("a: 1\na: 2", ""),
    "bytes": ("a: \x00\x1b[31m", "special characters are not allowed"),
    "half": ("a: [1", ""),
}


@pytest.mark.parametrize("kind", YAML)
def test_yaml_that_localfeat_does_not_write_is_refused(kind: str, marker: Path) -> None:
    text, reason = YAML[kind]
    (marker.parent / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml cannot be read: ") as caught:
        read_yaml("a.yaml")
    assert reason in str(caught.value) and "\n" not in str(caught.value) and not marker.exists()


def test_plain_yaml_is_read_as_omegaconf_reads_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1e-3\nb: {16: x}\nc: 2020-01-01\nd: [true, null, 1.0, yes]\ne: ${oc.env:HOME}")
    expected = {"a": 1e-3, "b": {16: "x"}, "c": "2020-01-01", "d": [True, None, 1.0, True], "e": "${oc.env:HOME}"}
    assert read_yaml(tmp_path / "a.yaml") == expected


def test_nothing_in_a_runs_configuration_is_looked_up(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    tampered(copied, "dataset", root="${oc.env:SECRET}", source="${oc.decode:${oc.env:SECRET}}")
    (copied / ".hydra" / "overrides.yaml").write_text("- seed=${oc.env:SECRET}\n")
    assert RunFolder(copied).read_config()["dataset"]["root"] == "${oc.env:SECRET}"
    assert RunFolder(copied).read_overrides() == ["seed=${oc.env:SECRET}"]
    for content in ("seed: 1", "!!python/name:os.mkdir"):
        (copied / ".hydra" / "overrides.yaml").write_text(content)
        with pytest.raises(UserError, match=r"overrides\.yaml cannot be read"):
            RunFolder(copied).read_overrides()


def tampered(folder: Path, group: str, **values: Any) -> None:
    """Change values of a group in a run's configuration."""
    config = RunFolder(folder).read_config()
    config[group] |= values
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML, too


COMMANDS = {
    "resume": ("run", "resume={folder}"),
    "evaluate": ("evaluate", "run={folder}"),
    "evaluate last": ("evaluate", "run={folder}", "checkpoint=last"),
    "predict": ("predict", "run={folder}", "images={images}"),
    "probe": ("probe", "run={folder}", "split=test", "images=64", "train_images=64"),
}


def arguments_of(command: str, folder: Path) -> list[str]:
    """Return arguments for a run's folder, made to look unfinished for ``resume``; write images for ``predict``."""
    from PIL import Image

    images = folder.parent / "images"
    images.mkdir(exist_ok=True)
    Image.new("RGB", (16, 16)).save(images / "a.png")
    if command == "resume":
        (folder / "summary.json").unlink()
    return [part.format(folder=folder, images=images) for part in COMMANDS[command]]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_runs_configuration_cannot_name_code(
    command: str, copied: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tampered(copied, "method", _target_="hostile.Mine")
    line = refused(monkeypatch, capsys, *arguments_of(command, copied))
    assert "LOCALFEAT_TRUST=hostile" in line and not marker.exists()


def test_a_report_builds_no_foreign_method(
    copied: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (marker.parent / "hostile.py").write_text(MODULE.format(marker=str(marker)).replace("Mine", "Method2"))
    tampered(copied, "method", _target_="hostile.Method")
    assert call(monkeypatch, "report", str(copied), "output=report") in (0, 2)
    assert not marker.exists() and "hostile" not in sys.modules


WRONG_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "download": ("backbone", {"name": "hf-hub:timm/resnet18.a1_in1k"}),
    "folder": ("backbone", {"name": "local-dir:/"}),
    "variant": ("backbone", {"variants": {"16": "local-dir:/"}}),
    "file": ("backbone", {"arguments": {"checkpoint_path": "x.pth"}}),
    "pretrained": ("backbone", {"arguments": {"pretrained": True}}),
    "overlay": ("backbone", {"arguments": {"pretrained_cfg_overlay": {"file": "x.pth"}}}),
    "name": ("backbone", {"name": None}),
    "variants": ("backbone", {"variants": "x"}),
    "arguments": ("backbone", {"arguments": "x"}),
    "split": ("split", {"modules": "x"}),
    "partial": ("method", {"_partial_": True}),
    "decoder": ("decoder", {"_partial_": "yes"}),
    "source": ("dataset", {"source": "x\u001b[31m"}),
    "size": ("dataset", {"image_size": "x"}),
    "optimizer": ("optimizer", {"lr": {"_target_": "os.mkdir"}}),
}


@pytest.mark.parametrize(
    ("command", "kind"),
    [("resume", "download"), ("resume", "overlay"), *(("evaluate", kind) for kind in WRONG_CONFIGS)],
)
def test_a_runs_configuration_of_other_values_is_refused(
    kind: str,
    command: str,
    copied: Path,
    marker: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    group, values = WRONG_CONFIGS[kind]
    tampered(copied, group, **values)
    before = files_below(copied)
    refused(monkeypatch, capsys, *arguments_of(command, copied))
    assert not marker.exists() and before - {"summary.json"} == files_below(copied) - {"summary.json"}


@pytest.mark.parametrize("key", ["image_size", "decoder", "optimizer", "backbone", "method"])
@pytest.mark.parametrize("value", [None, "x", [1], {}], ids=repr)
def test_a_runs_configuration_without_a_part_is_refused(
    key: str, value: Any, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(copied.parent)
    config = {**RunFolder(copied).read_config(), key: value}
    (copied / "config.yaml").write_text(json.dumps(config))
    refused(monkeypatch, capsys, *arguments_of("predict", copied))


# --- checkpoints ---


@pytest.mark.parametrize(
    ("command", "write"),
    [*((command, zip_with_pickle) for command in COMMANDS), *(("predict", write) for write in PICKLES[1:])],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_hostile_checkpoint_is_not_run(
    command: str,
    write: Any,
    copied: Path,
    marker: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in (copied / "checkpoints").iterdir():
        write(file)
    line = refused(monkeypatch, capsys, *arguments_of(command, copied))
    assert ".ckpt" in line and not marker.exists()


# --- links ---


def test_links_that_lead_out_are_named(tmp_path: Path) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "wandb").mkdir()
    outside.mkdir()
    (folder / "metrics.csv").write_text("step\n")
    (folder / "wandb" / "latest").symlink_to("../checkpoints")
    (tmp_path / "also").symlink_to(folder)
    RunFolder(folder).check_inside()
    RunFolder(tmp_path / "also").check_inside()  # the folder itself may be a link
    links = {
        "config.yaml": outside / "new.yaml",  # does not exist
        "checkpoints/last.ckpt": outside / "last.ckpt",
        "summary.json": Path("../outside/summary.json"),
        "inspection": outside,
        "loop": Path("../run2/loop"),
        "prefix": tmp_path / "run2",  # has the folder's name as a prefix
        ".hydra": Path("/"),
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
        with pytest.raises(UserError, match=f"{name} is a link that leads out of the run's folder"):
            RunFolder(folder).check_inside()
        (folder / name).unlink()
    os.mkfifo(folder / "pi\npe")
    with pytest.raises(UserError, match=r"pi\\npe is neither a file nor a folder"):
        RunFolder(folder).check_inside()


def test_an_inspection_writes_into_the_run_only(
    copied: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied.parent / "elsewhere").mkdir()
    (copied / "inspection").symlink_to("../elsewhere")
    assert "leads out" in refused(monkeypatch, capsys, "probe", f"run={copied}")
    assert list((copied.parent / "elsewhere").iterdir()) == []

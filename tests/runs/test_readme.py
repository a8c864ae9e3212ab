"""Every command of the README and its library example run as printed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import lightning
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import formats
from tests.helpers.command_line import call
from tests.helpers.wandb_account import without_login
from tests.helpers.whole_runs import draw_nothing

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SHORT = ["trainer.limit_train_batches=1", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
SMALL = [*SHORT, "backbone=swin_micro", "image_size=32", "batch_size=4", "epochs=1"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


COMMANDS = [line for block in blocks("bash") for line in block.strip().splitlines()]
PYTHON = [command for command in COMMANDS if command.startswith(("python -m localfeat.run ", "localfeat "))]


def test_all_commands_are_known_kinds() -> None:
    assert len(COMMANDS) >= 14
    assert [c for c in COMMANDS if c not in PYTHON] == ["make run"]  # covered by the packaging tests


def extra_arguments(command: str) -> list[str]:
    """Return overrides that make a training command small; none for other commands."""
    if command.startswith("localfeat plan"):
        return ["method=feature_recon", "split=k4"]  # given groups are not searched
    if command.startswith("localfeat sweep"):
        return [*SMALL, "method=e2e", "seed=0"]  # one job of 36
    if (
        not command.startswith("python -m localfeat.run")
        or "--" in command.replace("--config-dir", "")
        or "resume=outputs" in command
    ):
        return []
    if "dataset=cifar10 " in command:  # the paper's setting keeps Swin-T at 224 px
        return [*SHORT, "batch_size=2", "epochs=1"]
    if "backbone=timm" in command:
        return [override for override in SMALL if not override.startswith("backbone")]
    return [*SMALL, "dataset.val_fraction=0.3"] if "dataset=image_folder" in command else SMALL


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with everything that the README's commands name: data, images, configurations, a finished run."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        formats.write_image_folder(folder / "my_images", {"train": 8, "test": 3}, 2)
        formats.write_array_folder(folder / "my_bands", 13, (20, 24))
        formats.write_cifar10(folder / "data")
        formats.write_cifar100(folder / "data", train=1000)
        assert call(patch, "run", *SMALL, "hydra.run.dir=outputs/my_run") == 0
    return folder


def marked(command: str) -> object:
    """Mark commands of many seconds as slow; tests of the grid, of sweeps and of the planner are smaller ones."""
    words = ("dataset=cifar10", "localfeat sweep", "localfeat report", "localfeat probe", "split=", "mixup", "wandb")
    long = any(word in command for word in words) and command != COMMANDS[1]
    return pytest.param(command, marks=[pytest.mark.slow] if long else [])


@pytest.mark.parametrize("command", [marked(command) for command in PYTHON])
@pytest.mark.timeout(300)
def test_command(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    if "cifar" in command:
        formats.accept_cifar(monkeypatch, place / "data")
        formats.accept_cifar(monkeypatch, place / "data", hundred=True)
    draw_nothing(monkeypatch)
    if "logger=wandb" in command:
        without_login(place / "home", monkeypatch)
    if "resume=outputs" in command:
        cut_short(place / "outputs" / "my_run")
    name, *arguments = shlex.split(command.replace("python -m localfeat.run", "localfeat run"))[1:]
    before = {*(place / "outputs").rglob("summary.json")}
    code = call(monkeypatch, name, *arguments, *extra_arguments(command))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert not printed.err or "error" not in printed.err
    jobs = {"-m": 24, "--help": 0, "--cfg": 0}.get(arguments[0], 1)
    trains = name == "run" or (name == "sweep" and "dry=true" not in arguments)
    assert len({*(place / "outputs").rglob("summary.json")} - before) == jobs * trains
    assert printed.out.strip()


def cut_short(run: Path) -> None:
    """Make a finished run look like one that was stopped after its first epoch of two."""
    (run / "summary.json").unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "epochs": 2}))


def test_the_call_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call_it, *_ = blocks("python")
    monkeypatch.chdir(tmp_path)
    draw_nothing(monkeypatch)
    exec(compile(call_it, "README.md", "exec"), {})
    accuracy, optimizer = capsys.readouterr().out.splitlines()[-1].split(maxsplit=1)
    (summary,) = tmp_path.rglob("summary.json")
    assert float(accuracy) == json.loads(summary.read_text())["test_accuracy"] and "Optimization(lr=" in optimizer


@pytest.mark.slow
def test_library_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, example, *_ = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    images = TensorDataset(torch.randn(2, 3, 224, 224), torch.tensor([0, 1]))
    loader = DataLoader(images, batch_size=2)
    namespace = {"train_loader": loader, "val_loader": loader}
    exec(compile(example, "README.md", "exec"), namespace)
    learner, trainer = namespace["learner"], namespace["trainer"]
    assert isinstance(trainer, lightning.Trainer)
    assert trainer.global_step == trainer.max_epochs
    saved = torch.load(tmp_path / "model.pth", weights_only=True)
    assert torch.equal(saved["patch_embed.proj.weight"], learner.local_modules[0].stem.proj.weight)


def test_public_names_are_those_named() -> None:
    import localfeat

    listed = README.split("The public names are ")[1].split(".\n")[0]
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(localfeat.__all__)
    for name in localfeat.__all__:
        assert getattr(localfeat, name).__doc__


def test_files_and_links_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
    assert shutil.which("make")

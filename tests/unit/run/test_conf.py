"""The configuration files: each composes and builds, and opens with the command that uses it."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from localfeat.methods.registry import METHODS
from localfeat.run import trust
from localfeat.run.build import build_datamodule, build_learner, build_model
from localfeat.run.command import run
from localfeat.run.composition import plain
from localfeat.run.conf_dir import conf_dir
from localfeat.run.construct import construct
from localfeat.utils.errors import UserError
from tests.helpers.formats import write_image_folder, write_source
from tests.helpers.whole_runs import SMALL, TINY_SWIN, composed, configured, metrics, small_run

FILES = sorted(path.relative_to(conf_dir()).with_suffix("").as_posix() for path in conf_dir().glob("*/*.yaml"))
DATASETS = {"cifar10": 10, "cifar100": 100, "stl10": 10, "svhn": 10, "image_folder": 3, "digits": 10}


def first_command(file: str) -> list[str]:
    """Return the overrides of the command in the first comment that is not ``@package``."""
    lines = (conf_dir() / f"{file}.yaml").read_text().splitlines()
    line = next(line for line in lines if "@package" not in line)
    assert line.startswith("# python -m localfeat.run "), f"{file}: {line}"
    return shlex.split(line.removeprefix("# python -m localfeat.run "))


def choices(file: str) -> tuple[str, str]:
    group, name = file.split("/")
    return group, name


@pytest.mark.parametrize("file", FILES)
def test_every_file_opens_with_a_command_that_uses_it(file: str, tmp_path: Path) -> None:
    overrides = [override.replace("<folder>", str(tmp_path)) for override in first_command(file)]
    group, name = choices(file)
    assert overrides[0] == f"{group}={name}", "the command begins with this very choice"
    if file == "dataset/image_folder":
        overrides.append(f"dataset.root={tmp_path}")
    config = composed(*overrides)
    plain(config)
    own = OmegaConf.load(conf_dir() / f"{file}.yaml")
    target = config if group in ("preset", "experiment", "debug") else config[group]
    flat = {key for key in leaves(own) if not key.startswith("defaults")}
    assert flat <= set(leaves(target)), "all of the file is in the configuration"


def leaves(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, DictConfig) or not node:
        return [prefix]
    return [leaf for key in node for leaf in leaves(node._get_node(key), f"{prefix}.{key}".lstrip("."))]


def test_a_command_stands_in_the_help_for_every_group() -> None:
    text = (conf_dir() / "config.yaml").read_text()
    commands = re.findall(r"^ +python -m localfeat.run ((?!-m).*)$", text, re.M)
    assert len(commands) == 2
    for command in commands:
        composed(*shlex.split(command))
    (sweep,) = re.findall(r"^ +python -m localfeat.run -m (.*)$", text, re.M)
    options = [[f"{key}={v}" for v in values.split(",")] for key, values in (o.split("=") for o in sweep.split())]
    for overrides in itertools.product(*options):
        composed(*overrides)


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_dataset_builds(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if dataset == "image_folder":
        write_image_folder(tmp_path, {"train": 60, "test": 5})
    elif dataset != "digits":
        write_source(monkeypatch, dataset, tmp_path)
    overrides = f"dataset={dataset}", f"dataset.root={tmp_path}", "batch_size=8", "dataset.val_fraction=0.34"
    configuration = configured(*overrides)
    data = build_datamodule(configuration)
    assert data.num_classes == len(data.class_names) == DATASETS[dataset]
    images, labels = next(iter(data.ordered_loader("train")))
    inputs, _ = data.prepare(images[:2], labels[:2], training=True)
    assert inputs.shape == (2, 3, configuration.image_size, configuration.image_size)


@pytest.mark.parametrize(
    "backbone",
    [
        "swin_micro",
        "swin_tiny",
        *(pytest.param(f"swin_{b}", marks=pytest.mark.slow) for b in ("small", "base", "large")),
    ],
)
def test_every_backbone_builds_with_the_parameters_it_says(backbone: str) -> None:
    """The count in its comment includes a classifier of 1000 classes (ImageNet), or of 10 for the small backbone."""
    size, classes = (32, 10) if backbone == "swin_micro" else (224, 1000)
    model = build_model(configured(f"backbone={backbone}", f"image_size={size}"), classes)
    (said,) = re.findall(r"([\d.]+) M parameters", (conf_dir() / "backbone" / f"{backbone}.yaml").read_text())
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert f"{millions:.{1 if '.' in said else 0}f}" == said


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["swin_base", "swin_large"])
def test_large_backbones_build_at_384(backbone: str) -> None:
    model = build_model(configured(f"backbone={backbone}", "image_size=384"), 10)
    assert model.patch_embed.img_size == (384, 384) and model.layers[0].blocks[0].window_size == (12, 12)


@pytest.mark.parametrize("file", [f for f in FILES if f.split("/")[0] in ("method", "split", "decoder", "optimizer")])
def test_every_part_of_a_learner_builds(file: str) -> None:
    overrides = first_command(file)
    learner = build_learner(configured("backbone=swin_micro", *overrides), 10)
    assert sum(learner.blocks_per_module) == 8
    if file == "split/cuts":
        assert learner.blocks_per_module == [1, 1, 3, 3]
    if file == "split/even":
        assert learner.blocks_per_module == [1, 1, 1, 1, 2, 2]


@pytest.mark.slow
def test_settings_of_a_run_run(tmp_path: Path) -> None:
    chosen = ["callbacks/ema", "efficiency/none", "logger/csv", "trainer/auto"]  # others: SMALL, test_sweep
    commands = [override for file in chosen for override in first_command(file)]
    small_run(tmp_path, *commands, "epochs=1", "callbacks.progress_bar=false")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_modules_run(tmp_path: Path) -> None:
    small_run(tmp_path, *first_command("efficiency/compile"), "epochs=1", "method=e2e")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable GPU"):
        small_run(tmp_path, "trainer=gpu")


@pytest.mark.slow
def test_experiments_run(tmp_path: Path) -> None:
    summary = run(
        composed(*first_command("experiment/smoke"), *TINY_SWIN, "callbacks.progress_bar=false"), tmp_path / "a"
    )
    assert summary["epochs"] == 1 and summary["module_losses"]

    write_image_folder(tmp_path / "images", {"train": 60, "test": 10}, size=(32, 32))
    overrides = [o.replace("<folder>", str(tmp_path / "images")) for o in first_command("experiment/cifar10_small")]
    less = ["epochs=1", "batch_size=16", "trainer.limit_train_batches=2", "callbacks.progress_bar=false"]
    summary = run(composed(*overrides, *less), tmp_path / "b")
    assert summary["precision"] == "bf16-mixed" and summary["classes"] == ["class_0", "class_1", "class_2"]


def test_one_batch(tmp_path: Path) -> None:
    summary = run(composed(*first_command("debug/one_batch"), *TINY_SWIN, "callbacks.progress_bar=false"), tmp_path)
    assert [row["step"] for row in metrics(tmp_path) if row.get("train/loss")] == ["0"] and summary["epochs"] == 1


@pytest.mark.slow
def test_overfitting_sees_one_batch_and_learns_it(tmp_path: Path) -> None:
    less = [*TINY_SWIN, "batch_size=16", "optimizer.lr=0.005", "callbacks.progress_bar=false", "method=e2e"]
    run(composed(*first_command("debug/overfit"), *less), tmp_path)
    losses = [float(row["train/loss"]) for row in metrics(tmp_path) if row.get("train/loss")]
    assert len(losses) == 100 and losses[-1] < 0.1 * losses[0]


@pytest.mark.slow
def test_the_profile_is_in_the_runs_folder(tmp_path: Path) -> None:
    less = [*TINY_SWIN, "trainer.limit_train_batches=2", "callbacks.progress_bar=false"]
    run(composed(*first_command("debug/profiler"), *less), tmp_path)
    assert "run_training_batch" in (tmp_path / "fit-profile.txt").read_text()


# --- a dataset sets its backbone and image size, and the command line wins ---


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_dataset_sets_its_backbone_and_image_size(dataset: str, tmp_path: Path) -> None:
    config = composed(f"dataset={dataset}", f"dataset.root={tmp_path}")
    small = dataset == "digits"
    assert config.backbone.arguments.get("embed_dim") == (32 if small else None)
    assert (config.image_size, config.dataset.image_size) == ((16, 16) if small else (224, 224))
    assert (config.batch_size, config.epochs) == ((64, 40) if small else (128, 100))
    assert config.optimizer.lr == pytest.approx(1e-3 if small else 5e-4 * 128 / 512)
    assert config.dataset.horizontal_flip == (dataset not in ("digits", "svhn"))


GIVEN = ["dataset=cifar10", "backbone=swin_micro", "image_size=32", "epochs=7", "optimizer=adamw_small", "batch_size=9"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(len(GIVEN))))[::60], ids=str)
def test_the_command_line_wins_in_any_order(order: tuple[int, ...]) -> None:
    config = composed(*(GIVEN[index] for index in order))
    assert config.dataset.source == "cifar10"
    assert config.backbone.arguments.embed_dim == 32
    assert (config.image_size, config.dataset.image_size) == (32, 32)
    assert (config.batch_size, config.dataset.batch_size, config.epochs) == (9, 9, 7)
    assert config.optimizer.lr == 1e-3


def test_the_learning_rate_follows_the_images_of_a_step() -> None:
    def lr(*overrides: str) -> float:
        return composed("dataset=cifar10", *overrides).optimizer.lr

    assert lr() == pytest.approx(5e-4 / 4)
    assert lr("batch_size=512") == pytest.approx(5e-4)
    assert lr("batch_size=512", "optimizer.accumulate=2") == pytest.approx(1e-3)
    assert lr("batch_size=512", "optimizer.lr=0.3") == 0.3


def test_the_seed_reaches_everything() -> None:
    config = composed("seed=5")
    assert config.dataset.seed == 5


def test_a_small_run_is_the_digits(tmp_path: Path) -> None:
    """``SMALL`` only reduces sizes, so tests run the same code as users."""
    ours, theirs = plain(composed(*SMALL)), plain(composed())
    same = ("method", "split", "decoder", "dataset", "efficiency", "logger", "seed", "image_size")
    assert {name: ours[name] for name in same if name != "dataset"} == {
        name: theirs[name] for name in same if name != "dataset"
    }
    assert ours["dataset"] == {**theirs["dataset"], "batch_size": 16}


def test_a_method_of_the_readers_own_with_a_field_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module need not import the names in the annotations of its base."""
    (tmp_path / "readers_method.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport localfeat\n\n"
        "@dataclass(frozen=True)\nclass Mine(localfeat.HeadAndDecoder):\n    margin: float = 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "_GIVEN", "readers_method")
    made = construct({"_target_": "readers_method.Mine", "name": "mine", "margin": 2, "width": 64}, "method")
    assert (made.margin, made.width, made.reconstruction_weight) == (2.0, 64, (3.0, 1.0))
    with pytest.raises(UserError, match=r"method\.margin=x: it must be a number"):
        construct({"_target_": "readers_method.Mine", "name": "mine", "margin": "x"}, "method")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_same_in_the_library_as_on_the_command_line(name: str) -> None:
    made = construct(plain(composed(f"method={name}"))["method"], "method")
    assert type(made) is type(METHODS[name])
    assert as_lists(made) == as_lists(METHODS[name])


def as_lists(method: Any) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple | list) else value for key, value in vars(method).items()}

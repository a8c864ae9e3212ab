"""Users' mistakes: one line on stderr that names the mistake and its fix, exit code 2, nothing left behind."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

from localfeat.methods.registry import METHODS
from localfeat.run import process
from localfeat.run.composition import plain
from localfeat.run.conf_dir import conf_dir
from localfeat.utils.errors import UserError
from tests.helpers.command_line import call, said_at_once
from tests.helpers.whole_runs import TINY_SWIN, composed

SHORT = ["experiment=smoke", "trainer=cpu", *TINY_SWIN, "callbacks.progress_bar=false"]
"""Overrides that keep a run to a second, should it not be refused."""

HEAVY = ["torch", "torchvision", "lightning", "timm", "wandb", "matplotlib", "sklearn", "numpy", "torchmetrics"]
CONTRASTS = "method=feature_recon contrasts images by their class, which mixup and cutmix blur: set dataset.mixup=0"
BATCHES = "it must be a number of batches from 1, a share like 0.1, or null for all"
METHOD_NAMES = ", ".join(sorted(METHODS))
SYNTAX = "not key=value (a list is [1,2]"

KEYS_AND_GROUPS = {
    "epoch=3": "epoch: there is no such key; did you mean epochs?",
    "lr=0.1": "lr: there is no such key; did you mean optimizer.lr?",
    "optimizer.lrr=1": "optimizer.lrr: there is no such key; did you mean optimizer.lr?",
    "optimiser=adamw": "optimiser: there is no such key; did you mean optimizer?",
    "temprature=1": "temprature: there is no such key; did you mean method.temperature?",
    "split.cuts=[1,2]": "split.cuts: there is no such key",  # of k4; split=cuts has it
    "zzz=1": "zzz: there is no such key (see --cfg job)",
    "+extra.key=1": "extra: there is no such key (see --cfg job)",
    "+method.depth=1": "method.depth: there is no such key",
    "+callbacks.folder=here": "callbacks.folder: there is no such key",
    "dataset.std=[0,0,0]": "std=[0.0, 0.0, 0.0]: each needs a value per channel, and std must be above 0",
    "+epochs=3": "+epochs: this key exists already; leave out the +",
    "~method.temperature": "~method.temperature: keys cannot be removed; give them another value",
    "method=foo": f"method=foo: it is one of {METHOD_NAMES}",
    "dataset=mnist": "dataset=mnist: it is one of cifar10, cifar100, digits, image_folder, stl10, svhn",
    "method=null": f"method=null: it is one of {METHOD_NAMES}",
    "epochs": "epochs: not key=value; write epochs=<value>",
    "epochs 3": "epochs: not key=value; write epochs=3",
    "k4": "k4: not key=value; write split=k4",
    "image_recon epochs=3": "image_recon: not key=value; write method=image_recon",
    "runs/my_run": "runs/my_run: not key=value (see --help)",
    "--epochs=3": "unrecognized arguments: --epochs=3 (write epochs=3)",
    "epochs=[1": f"epochs=[1: {SYNTAX}; as text: \"epochs='[1'\")",
    "logger.project=ü": f"logger.project=ü: {SYNTAX}; as text: \"logger.project='ü'\")",
    "=3": "=3: not key=value",
    "seed=0,1": "seed=0,1: several values make a sweep, on the command line with -m; a list is 'seed=[0,1]'",
    "method=e2e,trgl": "method=e2e,trgl: several values make a sweep, on the command line with -m",
    "epochs=${nothing}": "epochs: Interpolation key 'nothing' not found",
    "--nothing": "unrecognized arguments: --nothing (see --help)",
    "--cfg everything": "argument --cfg/-c: invalid choice: 'everything'",
}
TYPES = {
    "epochs=abc": "epochs=abc: it must be a whole number",
    "epochs=null": "epochs=null: it must be a whole number",
    "seed=1.5": "seed=1.5: it must be a whole number",
    "seed=true": "seed=true: it must be a number",
    "method.temperature=x": "method.temperature=x: it must be a number",
    "method.temperature=nan": "method.temperature=nan: it must be a finite number",
    "trainer.deterministic=maybe": "trainer.deterministic=maybe: it must be true or false",
    "trainer.precision=64": "trainer.precision=64: it must be '32-true', 'bf16-mixed' or '16-mixed'",
    "split=cuts split.cuts=3": "split.cuts=3: it must be a list",
    "backbone.arguments=3": "backbone.arguments=3: it must be a group of values",
    "method._target_=localfeat.nothing": "method._target_=localfeat.nothing: nothing of that name can be imported",
}
RANGES = {
    "epochs=0": "epochs=0: it must be at least 1",
    "batch_size=0": "batch_size=0: it must be at least 1",
    "backbone.arguments.patc_size=2": "there is no such key yet; did you mean backbone.arguments.patch_size?",
    "backbone.arguments.qk_norm=true": "there is no such key yet; add it with +backbone.arguments.qk_norm=<value>",
    "split.modules='a\x1b[31m'": r"split.modules=a\x1b[31m: it must be",
    "batch_size=1": "batch_size=1: method=feature_recon compares images, at least 2 of them",
    "batch_size=5000": "batch_size=5000 is larger than the 1294 training images",
    "seed=-1": "seed=-1: it must lie between 0 and 4294967295",
    "seed=99999999999999999999": "seed=99999999999999999999: it must lie between 0 and 4294967295",
    "optimizer.lr=-1": "optimizer.lr=-1.0: it must be above 0",
    "optimizer.eps=-1": "optimizer.eps=-1.0: it must be above 0",
    "optimizer.betas=[0.9,1.5]": "optimizer.betas=(0.9, 1.5): it must be two numbers in [0, 1)",
    "dataset.val_fraction=1.5": "val_fraction=1.5: it must lie in [0, 1)",
    "dataset.num_workers=-1": "num_workers=-1: it must be 0 or more",
    "dataset.seed=7": "dataset.seed=7 differs from seed=0: set only seed",
    "method.reconstruction_loss=l1": "method.reconstruction_loss=l1: it is one of bce, mse, smooth_l1, cosine",
    "method.reconstruction_weight=[1,2,3]": "method.reconstruction_weight=[1.0, 2.0, 3.0]: two weights ≥ 0",
    "decoder=interp decoder.widths=[8,0]": "decoder.widths=[8, 0]: it must be one integer or more, each at least 1",
    "dataset.augmentation=strong": "dataset.augmentation=strong: it is one of swin, light, none",
    "trainer.limit_train_batches=0": f"trainer.limit_train_batches=0: {BATCHES}",
    "trainer.limit_val_batches=-1": f"trainer.limit_val_batches=-1: {BATCHES}",
    "trainer.limit_test_batches=0.001": "trainer.limit_test_batches=0.001: less than one of 23 batches",
    "trainer.max_steps=0": "trainer.max_steps=0: it must be at least 1, or -1 for no limit",
    "callbacks.checkpoint_every_n_epochs=0": "callbacks.checkpoint_every_n_epochs=0: it must be at least 1",
    "callbacks.checkpoint_every_n_batches=0": "callbacks.checkpoint_every_n_batches=0: it must be at least 1",
    "callbacks.ema=2": "callbacks.ema=2.0: a decay lies between 0 and 1",
}
COMBINATIONS = {
    "dataset.mixup=0.5": CONTRASTS,
    "dataset.cutmix=0.5": CONTRASTS,
    "callbacks.early_stopping=1 dataset.val_fraction=0": "callbacks.early_stopping=1: it needs validation",
    "split=even split.modules=99": "split.modules=99: 99 local modules need 99 blocks: this backbone has 4",
    "split.modules=3": "split.modules=3: 4 stages cannot be shared equally by 3 local modules: use split=even split.",
    "split=cuts": "split.cuts has to be given: 'split.cuts=[1,2,5]'",
    "split=cuts split.cuts=[3,2]": "split.cuts=[3, 2]: cuts must rise and lie between 1 and 3 (after that many blocks)",
    "split=cuts split.cuts=[1,9]": "split.cuts=[1, 9]: cuts must rise and lie between 1 and 3 (after that many blocks)",
    "image_size=30": "image_size=30: patches of 2 px and windows of 4 over 4 stages cannot tile it; sizes that work: ",
    "trainer.devices=2": "trainer.devices=2: localfeat trains on one device for now, trainer.devices=1",
    "trainer=gpu": "trainer=gpu: torch finds no usable GPU; trainer=cpu works everywhere",
    "trainer.precision=16-mixed": "trainer.precision=16-mixed needs a GPU: use bf16-mixed",
    "logger=wandb logger.mode=online": "W&B mode 'online' without a login: run 'wandb login'",
    "logger=wandb logger.mode=loud": "unknown W&B mode 'loud': use one of auto, online, offline, disabled",
}
BACKBONES = {
    "backbone=resnet18": "another timm model: backbone=timm backbone.name=resnet18",
    "backbone=swin_tini": "xcit_small; did you mean swin_tiny?",
    "backbone.name=swim": "backbone.name=swim: timm has no such model",
    "backbone.arguments.foo=1": "backbone.arguments.foo: there is no such key yet; add it with +backbone.",
    "+backbone.arguments.foo=1": "backbone: timm's swin_tiny_patch4_window7_224 takes no argument foo",
    "backbone.arguments.num_heads=[3]": "backbone: timm's swin_tiny_patch4_window7_224 cannot be built like this: ",
    "image_size=1": "image_size=1: it is smaller than a patch of 2 px",
    "backbone.drop_path_rate=2": "backbone.drop_path_rate=2.0: it must lie in [0, 1)",
    "backbone.pretrained=true backbone.weights=other.pth": "backbone.pretrained and backbone.weights: initial",
    "backbone.weights=x.pth": "backbone.weights=x.pth: there is no such file",
    "backbone.weights=other.pth": "other.pth lacks layers.0.blocks.0.",
    "backbone.weights=code.pth": "code.pth needs code to be unpickled, which is refused: save a plain state dict",
    "backbone.weights=text": "text is neither a safetensors nor a torch file, or it is damaged",
    "backbone.pretrained=true": "backbone.pretrained=true: the weights of swin_tiny_patch4_window7_224 cannot be downl",
}
FILES = {
    "dataset=cifar10 dataset.root=d": "cifar10: missing or damaged in {here}/d: cifar-10-batches-py/data_batch_1, ",
    "dataset=svhn dataset.root=d": "train_32x32.mat failed (<urlopen error no network>); fetch http://ufldl.stanford.edu",
    "dataset=stl10 dataset.root=d dataset.download=false": "and unpack archives there, or set download=true",
    "dataset=cifar10 dataset.root=text": "cifar10: missing or damaged in {here}/text: ",
    "dataset=image_folder dataset.root=text": "dataset.root=text: it is a file, not a folder",
    "backbone.weights=broken": "backbone.weights=broken: it is a folder, not a file",
    "dataset=image_folder": "dataset.root has to be given: dataset.root=<value>",
    "dataset=image_folder dataset.root=nowhere": "dataset.root=nowhere: there is no such folder",
    "dataset=image_folder dataset.root=untested": "image_folder: {here}/untested has no test folder; expected train/<c",
    "dataset=image_folder dataset.root=broken/train": "broken/train has no train and no test folder; it has cat, dog",
    "dataset=image_folder dataset.root=broken batch_size=4": "or leave such files out: dataset.skip_bad_images=true",
    "output_dir=text": "output_dir: text/",
    "output_dir=null": "output_dir is empty: give the parent folder of all runs, e.g. outputs",
    "output_dir=": "output_dir is empty",
    "hydra.run.dir=text": "output_dir: text cannot be written to (File exists)",
}
RESUME = {
    "resume=nowhere": "nowhere is not the folder of a run: there is no such folder",
    "resume=text": "text is not the folder of a run: it is a file, not a folder",
    "resume=untested": "untested is not the folder of a run: it has no config.yaml",
    "resume=": "resume= is empty: give the folder of a run that was cut short",
    "resume=0": "0 is not the folder of a run",
    "resume=foreign": "foreign is not the folder of a run: its config.yaml has no dataset, backbone, split, method",
    "resume=garbled": "garbled/config.yaml cannot be read: ",
    "resume=damaged": "damaged/checkpoints/last.ckpt cannot be read (",
    "resume=ended": "resume=ended: this run has ended, its summary.json is there",
    "resume=atuo epochs=9": "resume=atuo: it must be auto or the folder of a run that was cut short",
    "resume=fresh epochs=9": "resume=<folder> uses the run's own configuration: leave out epochs=9",
}
LINES = {**KEYS_AND_GROUPS, **TYPES, **RANGES, **COMBINATIONS, **BACKBONES, **FILES}


@pytest.fixture(scope="module")
def stumbling_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stumbling_blocks")
    (folder / "text").write_text("hello")
    write_images(folder)
    write_weights(folder)
    write_runs(folder)
    return folder


@pytest.fixture
def here(stumbling_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with bad files; disable network, GPU and login."""
    shutil.copytree(stumbling_blocks, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(process.gc, "collect", lambda: 0)  # it takes 0.1 s of every refusal
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path.parent / "hub"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return tmp_path


def write_images(here: Path) -> None:
    for path in ("untested/train", "broken/train", "broken/test"):
        for label in ("cat", "dog"):
            (here / path / label).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (16, 16)).save(here / path / label / f"{number}.png")
    image = here / "broken/train/cat/0.png"
    image.write_bytes(image.read_bytes()[:-30])


def write_weights(here: Path) -> None:
    torch.save({"conv.weight": torch.zeros(1)}, here / "other.pth")
    torch.save({"state_dict": {}, "settings": argparse.Namespace()}, here / "code.pth")


def write_runs(here: Path) -> None:
    config = OmegaConf.to_yaml(OmegaConf.create(plain(composed(*SHORT))))
    contents = {
        "foreign": "learning_rate: 1\n",
        "garbled": "a: [1\n",
        "fresh": config,
        "damaged": config,
        "ended": config,
    }
    for name, content in contents.items():
        (here / name).mkdir()
        (here / name / "config.yaml").write_text(content)
    (here / "damaged" / "checkpoints").mkdir()
    (here / "damaged" / "checkpoints" / "last.ckpt").write_text("half a file")
    (here / "ended" / "summary.json").write_text("{}")


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(arguments: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """Return the line that a command is refused with; assert that nothing else has changed."""
    before = contents(here)
    assert call(monkeypatch, "run", *arguments) == 2
    printed = capsys.readouterr()
    assert said_at_once(printed.out)
    assert printed.err.startswith("error: ") and printed.err.endswith("\n") and printed.err.count("\n") == 1
    assert contents(here) == before
    return printed.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    "typed", [pytest.param(line, marks=pytest.mark.slow if number % 2 else []) for number, line in enumerate(LINES)]
)
def test_is_refused_in_one_line(
    typed: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [s for s in SHORT if not (typed == "trainer=gpu" and s == "trainer=cpu")]
    if typed.startswith("dataset="):
        short.append("image_size=32")  # the networks of SHORT take no 224 px
    line = refused([*short, *typed.split()], here, monkeypatch, capsys)
    assert LINES[typed].replace("{here}", str(here)) in line


@pytest.mark.parametrize("typed", RESUME)
def test_resuming_is_refused_in_one_line(
    typed: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert RESUME[typed] in refused(typed.split(), here, monkeypatch, capsys)


def test_every_kind_has_a_line() -> None:
    assert len(LINES) + len(RESUME) > 100


def test_an_image_that_a_worker_cannot_read_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["dataset=image_folder", "dataset.root=broken", "dataset.in_memory=false", "dataset.num_workers=1"]
    less = ["batch_size=4", "image_size=16", "dataset.val_fraction=0", "method=e2e", "trainer.limit_train_batches=null"]
    assert call(monkeypatch, "run", *SHORT, *files, *less) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "broken/train/cat/0.png" in err


READING = ["dataset=image_folder", "dataset.root=broken", "batch_size=4", "image_size=16", "method=e2e"]
"""Arguments that train on the folder with one truncated image."""


def replace_image(kind: str, image: Path) -> None:
    image.unlink()
    if kind == "pipe":
        os.mkfifo(image)
    elif kind == "link":
        image.symlink_to("nowhere")
    elif kind == "ghostscript":
        image.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    else:  # a bitmap of 10.8 GB in 54 bytes, in a file whose name would colour the terminal
        size = struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
        image.with_name("\n\x1b[31m.png").write_bytes(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + size)


HOSTILE = {
    "pipe": "broken/train/cat/0.png: it is a pipe, socket or device; replace or delete it",
    "link": "broken/train/cat/0.png: it is a link that does not lead to a file; replace or delete it",
    "ghostscript": "broken/train/cat/0.png: it is none of PNG, JPEG, BMP, WEBP, TIFF, PPM, GIF",
    "bomb": r"broken/train/cat/\n\x1b[31m.png: it has more than 100,000,000 pixels, which is the limit",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_image_is_refused_in_one_line(
    kind: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_image(kind, here / "broken/train/cat/0.png")
    assert HOSTILE[kind] in refused([*SHORT, *READING], here, monkeypatch, capsys)


def test_bad_images_are_named_and_left_out_when_asked_for(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    less = ["dataset.skip_bad_images=true", "dataset.in_memory=false", "dataset.num_workers=1", "output_dir=out"]
    limits = ["dataset.val_fraction=0", "trainer.limit_train_batches=null", "epochs=2"]
    assert call(monkeypatch, "run", *SHORT, *READING, *less, *limits) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: left out: cannot read the image ")
    assert "broken/train/cat/0.png" in lines[0] and len(list((here / "out").rglob("summary.json"))) == 1


@pytest.mark.slow
def test_a_bad_job_of_a_sweep_does_not_stop_the_others(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["-m", *SHORT, "split=even", "split.modules=1,9,2", "output_dir=out"]
    assert call(monkeypatch, "run", *typed) == 2
    err = capsys.readouterr().err
    each, end = err.splitlines()
    assert re.fullmatch(r"error: job 1 \(.*split\.modules=9.*\): split\.modules=9: 9 local modules need .*", each)
    assert re.fullmatch(r"error: 1 of 3 jobs failed: 1 \(.*split\.modules=9.*\)", end)
    assert sorted(path.parent.name for path in (here / "out").rglob("summary.json")) == ["0", "2"]
    assert sorted(path.name for path in (here / "out").glob("*/*/*")) == ["0", "2", "multirun.yaml"]


def test_a_sweep_that_cannot_be_composed_runs_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", "-m", *SHORT, "method=e2e,foo", "output_dir=out") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: method=foo: it is one of auglocal, deep_supervision, dgl, e2e, ")
    assert {path.name for path in (here / "out").rglob("*") if path.is_file()} == {"multirun.yaml"}


# --- bugs are not reported as users' mistakes ---


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyError, FileNotFoundError, TypeError])
def test_a_fault_of_ours_is_not_explained_away(
    kind: type[Exception], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(*args: Any, **kwargs: Any) -> None:
        raise kind("a fault of ours")

    monkeypatch.setattr("localfeat.run.train.build_learner", fault)
    with pytest.raises(kind, match="a fault of ours"):
        call(monkeypatch, "run", *SHORT)
    assert "error: " not in capsys.readouterr().err


def test_a_full_error_can_be_had(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError, match="epochs=0: it must be at least 1"):
        call(monkeypatch, "run", *SHORT, "epochs=0")


# --- the same in a process of its own ---


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    variables = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("learning_rate=1", "learning_rate: there is no such key (see --cfg job)"),
        pytest.param(
            "backbone.pretrained=true",
            "backbone.pretrained=true: the weights of swin_tiny_patch4_window7_224 cannot be",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_process_ends_with_one_line(typed: str, line: str, tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    ended = python(tmp_path, "-m", "localfeat.run", *SHORT, typed, **offline)
    assert ended.returncode == 2 and said_at_once(ended.stdout)
    assert ended.stderr.startswith(f"error: {line}") and ended.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"hub"}


@pytest.mark.slow
def test_a_process_with_a_fault_of_ours_ends_with_a_stack_trace(tmp_path: Path) -> None:
    code = "import localfeat.run.train as t, localfeat.run.command as r; t.build_learner = lambda *a: 1 / 0; r.main()"
    ended = python(tmp_path, "-c", code, *SHORT)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr and "ZeroDivisionError: division by zero" in ended.stderr


# --- commands that answer without running anything ---


@pytest.mark.parametrize(
    "typed",
    [
        "--help",
        "run --help",
        "run --cfg job",
        "run --cfg job zzz=1",
        "run dataset=mnist",
        "run trainer.devices=2",
        "run image_size=abc",
        "run callbacks.ema=2",
        "run resume=nowhere",
        "run dataset=image_folder dataset.root=nowhere",
        "plan budget=8GiB epochs=0",
        "evaluate run=nowhere",
        "predict run=nowhere images=nowhere",
        "probe run=nowhere",
        "report nowhere",
        "sweep study=nowhere",
    ],
)
def test_answers_without_heavy_imports(typed: str, tmp_path: Path) -> None:
    code = (
        "import atexit, sys, localfeat.studies.commands as c;"
        f"atexit.register(lambda: print('imported:', [m for m in {HEAVY} if m in sys.modules], file=sys.stderr));"
        "c.main()"
    )
    ended = python(tmp_path, "-c", code, *typed.split())
    assert ended.stderr.splitlines()[-1] == "imported: []"
    assert ended.returncode == (0 if typed.endswith(("--help", "--cfg job")) else 2)


def test_help_names_groups_choices_and_values_that_there_are(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", "--help") == 0
    text = capsys.readouterr().out
    for group in (path for path in conf_dir().iterdir() if path.is_dir()):
        assert f"\n{group.name}: {', '.join(sorted(file.stem for file in group.glob('*.yaml')))}\n" in text
    values = re.findall(r"(?<![\w-])([a-z_.]+=(?:\[[^]]*\]|<\w+>|[^\s,;]+))", text.split("== Values used most")[1])
    values = [value for value in values if not value.startswith(("key=", "HYDRA"))]
    assert len(values) > 20
    values = [re.sub("[<>]", "", value) for value in values]
    composed(*(value for value in values if not value.startswith("split")))
    composed("split=even", "split.modules=6")
    composed("split=cuts", "split.cuts=[1,2,5]")
    assert {"split=even", "split.modules=6", "split=cuts", "split.cuts=[1,2,5]"} <= set(values)
    assert f"\nmethod: {METHOD_NAMES}\n" in text
    wide = ("method: ", "backbone: ")  # Hydra does not wrap a group's choices
    lines = [line for line in text.splitlines() if not line.startswith(wide)]
    assert max(map(len, lines)) <= 120


def test_cfg_job_prints_the_whole_configuration(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", "--cfg", "job", "method=e2e") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == OmegaConf.to_container(composed("method=e2e"))

"""Runs on images that are neither square nor of three channels: train, resume, evaluate, predict, export."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from localfeat.run.command import run
from localfeat.run.export import build_backbone, read_backbone_file
from localfeat.run.folder import RunFolder
from tests.helpers.command_line import call
from tests.helpers.formats import write_array_folder
from tests.helpers.whole_runs import At, child_exit, composed, small_run, watched_by
from tests.runs.test_run import assert_same_run

CASES = {
    "grey": ["in_chans=1", "image_size=[64,96]", "method=feature_recon", "backbone.arguments.window_size=2"],
    "bands": ["in_chans=13", "dataset.value_range=[0,10000]", "image_size=[16,32]", "method=image_recon"],
    "own normalisation": [
        *("in_chans=2", "image_size=16", "method=image_recon", "dataset.value_range=[0,10000]"),
        *("dataset.mean=[0.2,0.3]", "dataset.std=[0.1,0.4]", "callbacks.ema=0.9", "dataset.augmentation=swin"),
    ],
}


def images(case: str, folder: Path) -> Path:
    """Write 48 images of two classes."""
    if case != "grey":
        write_array_folder(folder, 13 if case == "bands" else 2, size=(20, 36), per_class=24)
        return folder
    for split in ("train", "test"):
        for label in range(2):
            (folder / split / f"class_{label}").mkdir(parents=True)
            generator = np.random.default_rng(label)
            for number in range(24):
                values = generator.integers(0, 120, (70, 100)) + 100 * label
                Image.fromarray(values.astype(np.uint8)).save(folder / split / f"class_{label}" / f"{number}.png")
    return folder


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == "bands" else pytest.mark.slow) for c in CASES])
def test_from_the_first_step_to_predictions(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = images(case, tmp_path / "images")
    options = ["dataset=image_folder", "preset=digits", f"dataset.root={root}", "split=k2", *CASES[case]]
    options += ["batch_size=8", "epochs=2", "dataset.val_fraction=0.25", "callbacks.checkpoint_every_n_batches=1"]
    whole, cut_short = tmp_path / "whole", tmp_path / "cut_short"
    summary = small_run(whole, *options)
    with pytest.MonkeyPatch.context() as patch:
        watched_by(patch, At("on_train_batch_start", lambda: os.kill(os.getpid(), signal.SIGKILL), 1, 2))
        assert child_exit(lambda: small_run(cut_short, *options)) == -signal.SIGKILL
    assert_same_run(cut_short, run(composed(f"resume={cut_short}"), "not used"), (whole, summary))

    assert call(monkeypatch, "evaluate", f"run={whole}") == 0
    scored = re.search(r"accuracy ([\d.]+)%, loss [\d.]+, 48 images", capsys.readouterr().out)
    table = tmp_path / "predictions.csv"
    assert call(monkeypatch, "predict", f"run={whole}", f"images={root / 'test'}", f"output={table}") == 0
    with table.open() as file:
        rows = list(csv.DictReader(file))
    right = sum(row["prediction"] in row["file"] for row in rows)
    assert scored and len(rows) == 48 and f"{right / 48:.2%}" == f"{scored[1]}%"
    check_export(whole, summary)
    pictures = [whole / name for name in ("learning_curves.png", "reconstructions.png")]
    assert all(Image.open(picture).size > (100, 100) for picture in pictures)


def check_export(folder: Path, summary: dict[str, Any]) -> None:
    """The file says how to build the model and to normalise its images."""
    values, file = RunFolder(folder).read_config(), RunFolder(folder).weights
    described = read_backbone_file(file)
    assert described.in_chans == values["in_chans"] == len(described.mean) == len(described.std)
    if values["dataset"]["mean"]:
        assert list(described.mean) == values["dataset"]["mean"] and list(described.std) == values["dataset"]["std"]
    size = [values["image_size"]] * 2 if isinstance(values["image_size"], int) else values["image_size"]
    logits = build_backbone(file).eval()(torch.zeros(1, described.in_chans, *size))
    assert logits.shape == (1, 2)
    assert json.loads((folder / "summary.json").read_text()) == summary


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["in_chans=0"], "error: in_chans=0: images have a whole number of channels, at least 1"),
        (["in_chans=5"], "error: in_chans=5: digits has images of 3 channels; it can be 3, or 1 for grey"),
        (["dataset.in_chans=1"], "error: dataset.in_chans=1 differs from in_chans=3: set only in_chans"),
        (["+backbone.arguments.in_chans=1"], "error: backbone.arguments.in_chans: set in_chans, for the images and"),
        (["dataset.mean=[0.5]"], "error: dataset.mean=[0.5], std=[0.229, 0.224, 0.225]: in_chans=3 needs a value per"),
        (
            ["+dataset.value_range=[0,1]"],
            "error: dataset.value_range=[0.0, 1.0]: it is for the .npy and TIFF files of",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "run", "trainer=cpu", *arguments) == 2
    said = capsys.readouterr().err.strip()
    assert said.splitlines()[-1].startswith(line)

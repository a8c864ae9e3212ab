"""Image files are damaged or vanish, and archives are incomplete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from experiments.reliability.injections.trial import QUICK, At, Trial, need, one_line, succeeds, watch
from tests.helpers.formats import accept_cifar, write_cifar10, write_image_folder


def image_trial(place: Path, *more: str) -> Trial:
    """Return a trial on 72 image files of three classes, read batch by batch."""
    trial = Trial(place, base=[*QUICK, *image_overrides(place / "data"), *more])
    write_image_folder(place / "data", {"train": 24, "test": 6}, size=(16, 16))
    return trial


def image_overrides(root: Path) -> list[str]:
    """Return the overrides of a run on such files."""
    small = ["image_size=16", "dataset.augmentation=light", "dataset.in_memory=false"]
    return ["dataset=image_folder", f"dataset.root={root}", *small]


def truncated(place: Path) -> str:
    """Cut an image file in half."""
    for workers in (0, 2):
        trial = image_trial(place / str(workers), f"dataset.num_workers={workers}")
        file = trial.place / "data" / "train" / "class_1" / "00030.png"
        sound = file.read_bytes()
        os.truncate(file, len(sound) // 2)
        one_line(trial.run(), 2, file.name)
        file.write_bytes(sound)
        trial.resume()
    return "one line names it, exit code 2, with and without worker processes; mended: identical"


def skipped(place: Path) -> str:
    """Cut an image file in half, with skip_bad_images."""
    trial = image_trial(place, "dataset.num_workers=2", "dataset.skip_bad_images=true")
    file = trial.place / "data" / "train" / "class_1" / "00030.png"
    os.truncate(file, file.stat().st_size // 2)
    ended = trial.run()
    succeeds(ended, file.name)
    need(sum(file.name in line for line in ended.errors.splitlines()) == 1, f"not named once: {ended.errors}")
    trial.readable()
    return "a warning names it once, exit code 0"


def vanished(place: Path) -> str:
    """Move the folder of training images away in the second epoch."""
    codes = set()
    for workers in (0, 2):
        trial = image_trial(place / str(workers), f"dataset.num_workers={workers}")
        train = trial.place / "data" / "train"
        away = train.with_name("away")

        def move(train: Path = train, away: Path = away) -> None:
            train.rename(away)

        ended = trial.run(prepare=lambda move=move: watch(At("on_train_epoch_start", move, 1)))
        need(ended.code in (1, 2), f"exit code {ended.code}: {ended.last_line}")
        one_line(ended, ended.code, str(train))
        codes.add(ended.code)
        away.rename(train)
        trial.resume()
    code = " or ".join(map(str, sorted(codes)))
    return f"one line names an image, exit code {code}, with and without worker processes; there again: identical"


def half_an_archive(place: Path) -> str:
    """Cut one of CIFAR-10's files in half."""
    data = place / "data"
    overrides = ["dataset=cifar10", "image_size=16", "dataset.augmentation=light", "dataset.download=false"]
    trial = Trial(place, *overrides, f"dataset.root={data}")
    write_cifar10(data)
    shutil.copytree(data, place / "sound")
    file = data / "cifar-10-batches-py" / "data_batch_3"
    os.truncate(file, file.stat().st_size // 2)

    def accept() -> None:
        accept_cifar(pytest.MonkeyPatch(), place / "sound")

    one_line(trial.run(prepare=accept), 2, "cifar")
    need(not trial.folder.exists(), "a folder is left")
    shutil.copyfile(place / "sound" / file.parent.name / file.name, file)
    succeeds(trial.run(prepare=accept))
    trial.readable()
    return "one line, exit code 2, no folder; with the whole file it trains"


FAULTS = [
    ("an image is cut short", "one line, exit code 2; mended: identical", truncated),
    ("the same, dataset.skip_bad_images=true", "goes on with a warning", skipped),
    ("training images vanish in training", "one line; there again: identical", vanished),
    ("CIFAR-10 came only half", "one line, exit code 2; then trains", half_an_archive),
]

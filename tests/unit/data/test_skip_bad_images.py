"""skip_bad_images: bad files are reported once and left out, everything else is unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from localfeat.data.datamodule import ImageDataModule
from localfeat.utils.errors import UserError
from tests.helpers.formats import write_image_folder

BAD = ("train/class_1/00005.png", "train/class_0/00002.png")
WAYS = [(True, 0), (False, 0), (False, 1)]  # in memory, worker processes


def damage(root: Path, *files: str) -> None:
    """Truncate the first file, and replace the others with other content."""
    for number, name in enumerate(files):
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[:150] if number == 0 else b"<html>not found</html>")


def folder(root: Path, in_memory: bool, workers: int, **arguments: object) -> ImageDataModule:
    settings = {"batch_size": 3, "image_size": 14, "val_fraction": 0, "skip_bad_images": True, **arguments}
    return ImageDataModule("image_folder", root, in_memory=in_memory, num_workers=workers, **settings)  # type: ignore[arg-type]


def rows(batches: list[tuple[Tensor, Tensor]]) -> set[tuple[int, ...]]:
    """Return each image with its label."""
    return {
        (int(label), *image.flatten().tolist())
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    }


@pytest.mark.parametrize(("in_memory", "workers"), WAYS)
def test_what_remains_is_what_a_folder_without_them_gives(
    in_memory: bool, workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image_folder(tmp_path / "with", {"train": 4, "test": 2}, size=(16, 16))
    shutil.copytree(tmp_path / "with", tmp_path / "without")
    damage(tmp_path / "with", *BAD)
    for name in BAD:
        (tmp_path / "without" / name).unlink()
    data = folder(tmp_path / "with", in_memory, workers)
    found = rows(list(data.ordered_loader("train")))
    expected = rows(list(folder(tmp_path / "without", in_memory, 0, skip_bad_images=False).ordered_loader("train")))
    assert found == expected and len(found) == 10
    list(data.ordered_loader("train"))
    list(data.train_dataloader())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("warning: left out: cannot read the image /") for line in lines)
    assert sorted(name for name in BAD for line in lines if name in line) == sorted(BAD)


@pytest.mark.parametrize(("in_memory", "workers"), WAYS)
def test_a_resumed_run_sees_the_same_batches(in_memory: bool, workers: int, tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"train": 8, "test": 2}, size=(16, 16))
    damage(tmp_path, "train/class_1/00009.png", "train/class_0/00002.png")
    whole = list(folder(tmp_path, in_memory, workers, seed=3).train_dataloader())
    resumed = folder(tmp_path, in_memory, workers, seed=3)
    state = resumed.state_dict() | {"batch": 2}
    resumed.load_state_dict(state)
    rest = list(resumed.train_dataloader())
    assert len(rest) == len(whole) - 2 == (5 if in_memory else 6)
    for (images, labels), (again, same) in zip(whole[2:], rest, strict=True):
        assert torch.equal(images, again) and torch.equal(labels, same)
    assert in_memory or sum(len(labels) for _, labels in whole) == 22


@pytest.mark.parametrize(("in_memory", "workers"), WAYS)
def test_a_class_without_images_is_an_error(in_memory: bool, workers: int, tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"train": 2, "test": 1})
    damage(tmp_path, "train/class_1/00002.png", "train/class_1/00003.png")
    with pytest.raises(
        UserError, match=r"none of the 2 images of the class of .*class_1.* can be decoded; repl"
    ) as error:
        list(folder(tmp_path, in_memory, workers).train_dataloader())
    assert "\n" not in str(error.value)


def test_a_class_of_the_test_images_too(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"train": 2, "test": 1})
    damage(tmp_path, "test/class_0/00000.png")
    for in_memory, workers in WAYS:
        data = folder(tmp_path, in_memory, workers)
        with pytest.raises(UserError, match="none of the 1 images of the class of"):
            list(data.test_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_without_images_is_an_error(workers: int, tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"train": 4, "test": 1})
    damage(tmp_path, "train/class_1/00004.png", "train/class_1/00005.png")
    data = folder(tmp_path, False, workers, batch_size=2, eval_batch_size=2)
    with pytest.raises(UserError, match=r"none of the 2 images of a batch can be decoded, such as .*00004\.png"):
        list(data.ordered_loader("train"))


def test_files_without_a_header_do_not_change_how_the_others_are_stored(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"train": 4, "test": 2}, size=(9, 14))
    (tmp_path / "train/class_0/00001.png").write_bytes(b"")
    images, labels = next(iter(folder(tmp_path, True, 0, batch_size=11).train_dataloader()))
    assert images.shape == (11, 3, 9, 14) and torch.bincount(labels).tolist() == [3, 4, 4]

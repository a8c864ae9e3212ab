"""Image folders: layout, sizes and bad files."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localfeat.data import image_folder
from localfeat.data.datamodule import ImageDataModule
from localfeat.data.image_folder import ImageFolder
from localfeat.data.labelled import FileImages, TensorImages
from localfeat.utils.errors import UserError
from tests.helpers.formats import write_image_folder


def test_equal_sizes_are_kept_exactly(tmp_path: Path) -> None:
    written = write_image_folder(tmp_path, {"train": 300, "test": 2}, size=(9, 14))
    folder = ImageFolder(tmp_path, image_size=32)
    assert folder.num_classes == 3 and folder.class_names() == ["class_0", "class_1", "class_2"]
    assert folder.in_memory and folder.size("train") == 900
    for split, (images, labels) in written.items():
        loaded = folder.load(split)
        got, targets = loaded.fetch(torch.arange(len(loaded)))
        assert isinstance(loaded, TensorImages)
        np.testing.assert_array_equal(got.numpy(), images)
        np.testing.assert_array_equal(targets.numpy(), labels)


def test_unequal_sizes_are_stored_square(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"train": 4, "test": 2}, size=(40, 60))
    Image.new("RGB", (30, 50)).save(tmp_path / "test" / "class_0" / "zz.png")
    images, _ = ImageFolder(tmp_path, image_size=28).load("train").fetch(torch.arange(12))
    assert images.shape == (12, 3, 32, 32)
    original = Image.open(tmp_path / "train" / "class_0" / "00000.png")
    expected = original.crop((10, 0, 50, 40)).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("workers", [0, 2])
def test_from_files_equals_in_memory(tmp_path: Path, workers: int) -> None:
    write_image_folder(tmp_path, {"train": 6, "test": 2}, size=(20, 20))
    Image.new("RGB", (30, 50)).save(tmp_path / "train" / "class_0" / "zz.png")
    loaders = [
        ImageDataModule(
            "image_folder", tmp_path, image_size=14, batch_size=4, in_memory=kept, num_workers=workers, val_fraction=0
        ).train_dataloader()
        for kept in (True, False)
    ]
    assert isinstance(loaders[0].dataset, TensorImages) and isinstance(loaders[1].dataset, FileImages)
    for (images, labels), (from_files, same_labels) in zip(*loaders, strict=True):
        assert torch.equal(images, from_files) and torch.equal(labels, same_labels)


def test_too_large_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image_folder(tmp_path, {"train": 4, "test": 2}, size=(40, 40))
    monkeypatch.setattr(image_folder, "MEMORY_LIMIT", 18 * 16 * 16 * 3)
    kept_small, on_disk = ImageFolder(tmp_path, image_size=14), ImageFolder(tmp_path, image_size=21)
    assert kept_small.load("train").fetch(torch.arange(2))[0].shape == (2, 3, 16, 16)
    assert kept_small.in_memory and not on_disk.in_memory
    assert isinstance(on_disk.load("train"), FileImages)


def test_own_validation_folder(tmp_path: Path) -> None:
    written = write_image_folder(tmp_path, {"train": 5, "val": 2, "test": 1})
    data = ImageDataModule("image_folder", tmp_path, batch_size=15, val_fraction=0.4)
    images, _ = next(iter(data.ordered_loader("val")))
    np.testing.assert_array_equal(images.numpy(), written["val"][0])
    assert len(data.train_dataloader()) == 1


def test_layout_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no train and no test folder; expected train/<class>"):
        ImageDataModule("image_folder", tmp_path)
    write_image_folder(tmp_path, {"train": 2})
    with pytest.raises(UserError, match="has no test folder; expected train/<class>"):
        ImageDataModule("image_folder", tmp_path)
    (tmp_path / "test").mkdir()
    with pytest.raises(UserError, match="has no class folders"):
        ImageDataModule("image_folder", tmp_path)
    write_image_folder(tmp_path, {"test": 2}, classes=2)
    with pytest.raises(UserError, match=r"train and test .* differ in their classes \(only in train: class_2\)"):
        ImageDataModule("image_folder", tmp_path)
    (tmp_path / "test" / "class_2").mkdir()
    (tmp_path / "test" / "class_2" / "x.avif").touch()
    with pytest.raises(UserError, match=r"class_2 has no image \(it holds 1 \.avif\); fill or delete it"):
        ImageDataModule("image_folder", tmp_path)


@pytest.mark.parametrize(("in_memory", "workers"), [(True, 0), (False, 0), (False, 2)])
def test_a_truncated_image_is_named_in_one_line(tmp_path: Path, in_memory: bool, workers: int) -> None:
    write_image_folder(tmp_path, {"train": 4, "test": 2})
    bad = tmp_path / "train" / "class_1" / "00005.png"
    bad.write_bytes(bad.read_bytes()[:150])
    data = ImageDataModule(
        "image_folder", tmp_path, batch_size=2, val_fraction=0, in_memory=in_memory, num_workers=workers
    )
    with pytest.raises(UserError, match=r"class_1/00005\.png") as error:
        list(data.train_dataloader())
    assert "\n" not in str(error.value)


def test_classes_that_differ_by_their_unicode_form_are_one(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for name in (f"train/{composed}", f"test/{decomposed}", "train/dog", "test/dog"):
        picture(tmp_path / name / "0.png")
    assert ImageFolder(tmp_path, 16).class_names() == [composed, "dog"]
    picture(tmp_path / "train" / decomposed / "1.png")
    with pytest.raises(UserError, match="in two Unicode forms; merge them"):
        ImageFolder(tmp_path, 16)


def test_links_of_classes(tmp_path: Path) -> None:
    """One that leads nowhere, to a disk that is not mounted, loses no class; one that leads up is no class."""
    write_image_folder(tmp_path, {"train": 3, "test": 2})
    for target, reason in (("/mnt/nothing/here", "leads nowhere"), ("..", "has no image"), (".", "has no image")):
        (tmp_path / "train" / "c").symlink_to(target)
        with pytest.raises(UserError, match=f"train/c .*{reason}"):
            ImageFolder(tmp_path, 16)
        (tmp_path / "train" / "c").unlink()


def test_one_class_is_no_classification(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"train": 3, "test": 2}, classes=1)
    with pytest.raises(UserError, match="has one class, class_0; a classifier needs two or more"):
        ImageFolder(tmp_path, 16)


def test_what_is_left_out_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image_folder(tmp_path, {"train": 3, "test": 2})
    assert capsys.readouterr().err == ""
    for name in ("train/class_0/x.heic", "train/class_1/deep/y.HEIC", "test/class_0/notes", "test/class_0/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("train/b.png", "train/a.png", "test/a.png", "train/readme.txt"):
        picture(tmp_path / name)
    assert ImageFolder(tmp_path, 16).size("train") == 9
    assert capsys.readouterr().err == (
        f"warning: left out 3 files that are no images of {tmp_path} (it holds 2 .heic, 1 no suffix)\n"
        f"warning: 3 images lie in no class folder and are left out, such as {tmp_path}/train/a.png\n"
    )


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, "PNG")

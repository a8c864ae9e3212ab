"""Image folders: layout, sizes, modes and bad files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localfeat.data import ImageDataModule, image_folder
from localfeat.data.decode import read_image
from localfeat.data.files import image_files_loader, list_images
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
    expected = original.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
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
    with pytest.raises(UserError, match=r"train and test .* differ in their classes: class_2"):
        ImageDataModule("image_folder", tmp_path)
    (tmp_path / "test" / "class_2").mkdir()
    with pytest.raises(UserError, match="class_2 has no image"):
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


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.png.*replace or delete"):
        read_image(tmp_path / "x.png")


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(grey[..., None], 3, axis=2)
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    alpha = Image.fromarray(np.dstack([expected, 255 - grey]))
    pictures = {"L": Image.fromarray(grey), "I;16": wide, "RGBA": alpha, "P": Image.fromarray(grey).convert("P")}
    pictures["LA"] = alpha.convert("LA")
    for mode, picture in pictures.items():
        picture.save(tmp_path / "x.png")
        np.testing.assert_array_equal(read_image(tmp_path / "x.png"), expected, err_msg=mode)
    Image.fromarray(expected).convert("CMYK").save(tmp_path / "x.jpg", quality=100)
    assert np.abs(read_image(tmp_path / "x.jpg").astype(int) - expected).max() < 8
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(UserError, match="floating-point"):
        read_image(tmp_path / "x.tiff")


def test_bare_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        list_images(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"no image in .*\.png"):
        list_images(tmp_path)
    for name, size in {"b.png": (20, 10), "a/c.JPG": (7, 9), "a/a.png": (16, 16), ".hidden/x.png": (4, 4)}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size, (255, 0, 9)).save(tmp_path / name)
    paths = list_images(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in paths] == ["a/a.png", "a/c.JPG", "b.png"]
    batches = list(image_files_loader(paths, image_size=12, batch_size=2, num_workers=0))
    assert [images.shape for images, _ in batches] == [(2, 3, 12, 12), (1, 3, 12, 12)]
    assert torch.cat([index for _, index in batches]).tolist() == [0, 1, 2]
    assert batches[0][0].dtype == torch.uint8 and batches[0][0][0, :, 5, 5].tolist() == [255, 0, 9]

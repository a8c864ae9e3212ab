"""The one walk over image files: what belongs to a folder, and what is told of the rest."""

import os
from collections import Counter
from pathlib import Path

import pytest

from localfeat.data.files import image_paths, list_images
from localfeat.data.image_folder import ImageFolder
from localfeat.utils.errors import UserError
from tests.helpers.formats import write_image_folder


def files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in list_images(root)]


def test_images_are_told_by_suffix_and_sorted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        list_images(tmp_path / "none")
    files(tmp_path, "notes.txt", ".hidden.png", ".hidden/x.png")
    with pytest.raises(UserError, match=r"no image in .* \(it holds 1 \.txt\); looked for \.bmp .*\.png"):
        list_images(tmp_path)
    files(tmp_path, "b.png", "a/c.JPG", "a/a.jfif", "a.PNG/x.tiff")
    assert found(tmp_path) == ["a/a.jfif", "a/c.JPG", "a.PNG/x.tiff", "b.png"]


def test_folders_that_systems_make_hold_no_images(tmp_path: Path) -> None:
    systems = (
        "@eaDir/0.png",
        "__MACOSX",
        "lost+found",
        "$RECYCLE.BIN",
        "#recycle",
        ".thumbnails",
        ".ipynb_checkpoints",
    )
    files(tmp_path, "0.png", "a/1.png", *(f"a/{system}/twin.jpg" for system in systems))
    assert found(tmp_path) == ["0.png", "a/1.png"]
    write_image_folder(tmp_path / "set", {"train": 2, "test": 2}, classes=2)
    files(tmp_path / "set", "train/@eaDir/class_0/x.png", "test/class_0/@eaDir/0.png/thumb.jpg")
    files(tmp_path / "set", "train/.ipynb_checkpoints/x.png")  # torchvision 2831: a notebook's folder became a class
    folder = ImageFolder(tmp_path / "set", 16)
    assert folder.class_names() == ["class_0", "class_1"] and folder.size("test") == 4


def test_linked_folders_belong_to_it_once(tmp_path: Path) -> None:
    files(tmp_path, "real/a/0.png", "real/a/1.png", "top/b/2.png")
    os.symlink(tmp_path / "real" / "a", tmp_path / "top" / "a")
    os.symlink(tmp_path / "top", tmp_path / "top" / "b" / "circle")
    assert found(tmp_path / "top") == ["a/0.png", "a/1.png", "b/2.png"]


def test_training_and_prediction_find_the_same_files(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "real", {"train": 3, "test": 2})
    for split in ("train", "test"):
        (tmp_path / "linked" / split).mkdir(parents=True)
        for name in ("class_0", "class_1", "class_2"):
            os.symlink(tmp_path / "real" / split / name, tmp_path / "linked" / split / name)
    folder = ImageFolder(tmp_path / "linked", 16)
    assert folder.size("train") == len(list_images(tmp_path / "linked" / "train")) == 9


def test_other_files_are_counted_by_suffix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files(tmp_path, "0.png", "a/x.heic", "a/y.HEIC", "labels.csv", "README")
    others = Counter[str]()
    image_paths(tmp_path, others=others)
    assert others == {".heic": 2, ".csv": 1, "no suffix": 1}
    list_images(tmp_path)
    line = f"warning: left out 4 files that are no images of {tmp_path} (it holds 2 .heic, 1 .csv, 1 no suffix)\n"
    assert sorted(capsys.readouterr().err) == sorted(line)

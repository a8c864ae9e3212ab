"""Sources return exactly the data on disk, and name missing files in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch

from localfeat.data.datamodule import ImageDataModule
from localfeat.data.registry import make_source
from localfeat.utils.errors import UserError
from tests.helpers import formats
from tests.helpers.serving import no_network, serve

NAMES = ["cifar10", "cifar100", "stl10", "svhn"]
CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10, "svhn": 10}


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) > 20
    return message


@pytest.mark.parametrize("name", NAMES)
def test_pixels_labels_and_class_count_come_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = formats.write_source(monkeypatch, name, tmp_path)
    source = make_source(name, tmp_path, 32, None)
    source.prepare(download=False)
    for split, (images, labels) in written.items():
        loaded = source.load(split)
        got, targets = loaded.fetch(torch.arange(len(loaded)))
        assert got.dtype == torch.uint8 and targets.dtype == torch.int64 and got.is_contiguous()
        np.testing.assert_array_equal(got.numpy(), images)
        np.testing.assert_array_equal(targets.numpy(), labels)
    assert source.num_classes == len(source.class_names()) == CLASSES[name]


def test_cifar10_names_come_from_the_meta_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats.write_source(monkeypatch, "cifar10", tmp_path)
    data = ImageDataModule("cifar10", tmp_path, download=False, batch_size=8)
    assert data.class_names == formats.CIFAR10_NAMES and data.num_classes == 10


def test_agrees_with_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import STL10

    class Labelled(STL10):
        train_list = STL10.train_list[:2]

    formats.write_source(monkeypatch, "stl10", tmp_path)
    Labelled.train_list = STL10.train_list[:2]
    reference = Labelled(str(tmp_path), split="train")
    images, labels = make_source("stl10", tmp_path, 96, None).load("train").fetch(torch.arange(30))
    for index in (0, 7, 29):
        image, label = reference[index]
        np.testing.assert_array_equal(images[index].permute(1, 2, 0).numpy(), np.asarray(image))
        assert labels[index] == label


def test_digits_are_fixed_and_disjoint() -> None:
    from sklearn.datasets import load_digits

    source = make_source("digits", "unused", 32, None)
    (train, train_labels), (test, test_labels) = (
        (split.fetch(torch.arange(len(split)))) for split in (source.load("train"), source.load("test"))
    )
    assert (len(train), len(test)) == (source.size("train"), source.size("test")) == (1438, 359)
    original = (load_digits().images * 255 / 16).round().astype(np.uint8)
    together = torch.cat([train, test])[:, 0].numpy()
    order = np.lexsort(together.reshape(1797, -1).T), np.lexsort(original.reshape(1797, -1).T)
    np.testing.assert_array_equal(together[order[0]], original[order[1]])
    shares = torch.bincount(test_labels) / torch.bincount(torch.cat([train_labels, test_labels]))
    assert (shares - 0.2).abs().max() < 0.01 and train.max() == 255


def test_wrong_number_of_classes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats.write_svhn(tmp_path, train=7)
    formats.accept_svhn(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"7 classes.*0\.\.9") as error:
        make_source("svhn", tmp_path, 32, None).load("train")
    one_line(error)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("download", [False, True])
def test_missing_files_are_named(name: str, download: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    data = ImageDataModule(name, tmp_path, download=download)
    with pytest.raises(UserError) as error:
        data.prepare_data()
    message = one_line(error)
    expected = {"cifar10": "data_batch_3", "cifar100": "meta", "stl10": "train_X.bin", "svhn": "test_32x32.mat"}
    assert expected[name] in message and str(tmp_path) in message and "http" in message
    assert ("no route" in message) == download and ("download=true" in message) != download


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_interrupted_download_leaves_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, b"half", breaks=True)
    with pytest.raises(UserError, match="reset") as error:
        make_source(name, tmp_path, 32, None).prepare(download=True)
    one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_from_the_server_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, b"<html>login</html>")
    with pytest.raises(UserError) as error:
        make_source("cifar10", tmp_path, 32, None).prepare(download=True)
    one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_download_unpacks_and_repairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notice a damaged file, and replace it from the (simulated) server's archive."""
    from torchvision.datasets import CIFAR10

    written = formats.write_source(monkeypatch, "cifar10", tmp_path)
    packed = formats.archive(tmp_path / CIFAR10.base_folder)
    (tmp_path / "packed").write_bytes(packed)
    monkeypatch.setattr(CIFAR10, "tgz_md5", formats.md5(tmp_path / "packed"))
    serve(monkeypatch, packed)
    (tmp_path / CIFAR10.base_folder / "test_batch").write_bytes(b"damaged")
    source = make_source("cifar10", tmp_path, 32, None)
    with pytest.raises(UserError, match=r"missing or damaged.*test_batch"):
        source.prepare(download=False)
    source.prepare(download=True)
    images, _ = source.load("test").fetch(torch.arange(20))
    np.testing.assert_array_equal(images.numpy(), written["test"][0])


def test_a_copied_archive_needsno_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    formats.write_source(monkeypatch, "cifar100", tmp_path / "elsewhere")
    root = tmp_path / "root"
    root.mkdir()
    (root / CIFAR100.filename).write_bytes(formats.archive(tmp_path / "elsewhere" / CIFAR100.base_folder))
    monkeypatch.setattr(CIFAR100, "tgz_md5", formats.md5(root / CIFAR100.filename))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    source = make_source("cifar100", root, 32, None)
    source.prepare(download=True)
    assert len(source.load("test")) == 100


def test_unknown_source() -> None:
    with pytest.raises(UserError, match=r"'mnist'.*digits, cifar10"):
        ImageDataModule("mnist")

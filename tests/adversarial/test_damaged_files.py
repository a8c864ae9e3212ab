"""Files of published datasets that are damaged, swapped or malicious: one line, nothing runs."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, STL10

from localfeat.data import torchvision_sources
from localfeat.data.registry import make_source
from tests.helpers import formats
from tests.helpers.serving import no_network, serve
from tests.unit.data.test_downloads import refused


class _Command:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("verified", [False, True])
def test_code_in_a_pickle_never_runs(verified: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is swapped after it was verified, or has the right checksum."""
    root = tmp_path / "made"
    formats.write_source(monkeypatch, "cifar10", root)
    source = make_source("cifar10", root, 32, None)
    source.prepare(download=False)
    (root / CIFAR10.base_folder / "test_batch").write_bytes(pickle.dumps(_Command(tmp_path / "ran"), protocol=2))
    if verified:
        formats.accept_cifar(monkeypatch, root)
        source.prepare(download=False)
    reason = (
        "holds posix.mkdir, which is not an array" if verified else "test_batch is damaged: it has the wrong checksum"
    )
    refused(source, f"cannot read cifar10 in .*: .*{reason}.*; fetch http", lambda source: source.load("test"))
    assert not (tmp_path / "ran").exists()
    assert len(source.load("train")) == 100


def test_a_file_swapped_while_it_is_read_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verified bytes are unpickled, while torchvision would open the file a second time."""
    root = tmp_path / "made"
    formats.write_source(monkeypatch, "cifar10", root)
    read = Path.read_bytes

    def swapping(path: Path) -> bytes:
        content = read(path)
        path.write_bytes(pickle.dumps(_Command(tmp_path / "ran"), protocol=2))
        return content

    monkeypatch.setattr(Path, "read_bytes", swapping)
    assert len(make_source("cifar10", root, 32, None).load("test")) == 20
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "svhn"])
def test_every_file_that_is_cut_short_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats.write_source(monkeypatch, name, tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    source = make_source(name, tmp_path, 32, None)
    for wanted in source.files().wanted:  # type: ignore[attr-defined]
        file = tmp_path / wanted
        content = file.read_bytes()
        cut = () if "class_names" in wanted else (content[:-1],)  # of which only the number of lines is known
        for damage in (*cut, content[: len(content) // 2], b""):
            file.write_bytes(damage)
            for fetching in (False, True):
                refused(source, f"missing or damaged in .*: {wanted}[;,].*fetch http", lambda s: s.prepare(fetching))  # noqa: B023
            assert file.read_bytes() == damage
        file.write_bytes(content)
    source.prepare(download=False)


@pytest.mark.parametrize("name", ["stl10", "svhn"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_file_damaged_after_the_check_is_one_line(
    name: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if torchvision's own check does not notice it."""
    formats.write_source(monkeypatch, name, tmp_path)
    source = make_source(name, tmp_path, 32, None)
    source.prepare(download=False)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *_: True)
    file = tmp_path / ("stl10_binary/{}_X.bin" if name == "stl10" else "{}_32x32.mat").format(split)
    content = file.read_bytes()
    for damage in (content[: len(content) // 2], b"", b"\0" * 300, b"MATLAB 5.0" + b"\xff" * 300):
        file.write_bytes(damage)
        refused(source, f"{name}.* in {tmp_path}", lambda source: source.load(split))


def test_half_a_list_of_class_names_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is the only file published without a checksum."""
    formats.write_source(monkeypatch, "stl10", tmp_path)
    content = formats.archive(tmp_path / STL10.base_folder)
    (tmp_path / "packed").write_bytes(content)
    monkeypatch.setattr(STL10, "tgz_md5", formats.md5(tmp_path / "packed"))
    serve(monkeypatch, content)
    file = tmp_path / STL10.base_folder / STL10.class_names_file
    whole = file.read_bytes()
    file.write_bytes(whole[:20])
    make_source("stl10", tmp_path, 32, None).prepare(download=True)
    assert file.read_bytes() == whole


def test_python_2_s_arrays_are_read() -> None:
    """The published files were pickled by NumPy under Python 2."""
    old = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87Rq\x03(K\x01K\x03"
        b"\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x03\x01\x02"
        b"\xfftb."
    )
    array = torchvision_sources._ArraysOnly(io.BytesIO(old), encoding="latin1").load()
    np.testing.assert_array_equal(array, np.array([1, 2, 255], dtype=np.uint8))
    assert torch.from_numpy(array).dtype == torch.uint8

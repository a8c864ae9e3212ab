"""Downloads: concurrent and killed processes, hostile archives, files that change after they were verified."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10

from localfeat.data import download
from localfeat.data.registry import make_source
from localfeat.data.sources import Source
from localfeat.utils import files as writing
from localfeat.utils.errors import UserError
from tests.helpers import formats
from tests.helpers.serving import no_network, serve

WANTED = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Return the archive of a small CIFAR-10 that torchvision accepts as the real one."""
    formats.write_source(monkeypatch, "cifar10", tmp_path / "made")
    content = formats.archive(tmp_path / "made" / CIFAR10.base_folder)
    trust(monkeypatch, content, tmp_path)
    return content


def trust(monkeypatch: pytest.MonkeyPatch, content: bytes, folder: Path) -> None:
    (folder / "packed").write_bytes(content)
    monkeypatch.setattr(CIFAR10, "tgz_md5", formats.md5(folder / "packed"))


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


COMPLETE = {CIFAR10.filename, CIFAR10.base_folder, *(f"{CIFAR10.base_folder}/{name}" for name in WANTED)}


def in_child(work: Callable[[], object], err: Path) -> int:
    """Start ``work`` in a child process with its stderr in ``err``; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stderr = err.open("w")
        work()
        code = 0
    finally:
        os._exit(code)


def refused(source: Source, part: str, act: Callable[[Source], object]) -> None:
    with pytest.raises(UserError, match=part) as error:
        act(source)
    assert str(error.value).isprintable()


def test_two_processes_at_once_share_one_download(
    packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, requests = tmp_path / "a" / "root", tmp_path / "requests"

    def slowly(position: int) -> None:
        if position == 0:
            with requests.open("a") as file:
                file.write("x")
            time.sleep(0.4)

    serve(monkeypatch, packed, reading=slowly)
    children = [
        in_child(lambda: make_source("cifar10", root, 32, None).prepare(download=True), tmp_path / f"err{number}")
        for number in range(3)
    ]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert requests.read_text() == "x" and names(root) == COMPLETE
    waited = [(tmp_path / f"err{number}").read_text().count("waiting for another process to") for number in range(3)]
    assert sorted(waited) == [0, 1, 1]


@pytest.mark.parametrize("moment", ["reading", "fetched", "unpacking", "renaming"])
def test_a_process_that_is_killed_leaves_what_the_next_one_mends(
    moment: str, packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        serve(monkeypatch, packed, reading=lambda position: die() if moment == "reading" and position else None)
        if moment == "fetched":
            monkeypatch.setattr(download, "unpack", die)
        if moment == "unpacking":
            copy = download._copy
            monkeypatch.setattr(
                download, "_copy", lambda source, file, md5, name: copy(source, file, md5, name) or die()
            )
        if moment == "renaming":
            monkeypatch.setattr(writing, "sync_folder", die)
        make_source("cifar10", root, 32, None).prepare(download=True)

    assert os.waitpid(in_child(killed, tmp_path / "err"), 0)[1] == signal.SIGKILL
    assert names(root) - COMPLETE  # the killed process has left something behind
    for name in names(root) & {f"{CIFAR10.base_folder}/{wanted}" for wanted in WANTED}:
        assert (root / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
    serve(monkeypatch, packed)
    make_source("cifar10", root, 32, None).prepare(download=True)
    assert names(root) == COMPLETE
    assert (root / CIFAR10.base_folder / "test_batch").read_bytes() == (
        tmp_path / "made" / CIFAR10.base_folder / "test_batch"
    ).read_bytes()


def test_sound_files_need_no_lock_and_no_archive(
    packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing is to be written")

    monkeypatch.setattr(download, "sole_writer", never)
    make_source("cifar10", tmp_path / "made", 32, None).prepare(download=True)


def test_a_file_system_without_locks_is_said(
    packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(file: Path) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(download, "try_lock", unsupported)
    serve(monkeypatch, packed)
    make_source("cifar10", tmp_path / "root", 32, None).prepare(download=True)
    assert names(tmp_path / "root") == COMPLETE
    assert capsys.readouterr().err.count("warning: no locks on this file system") == 1


@pytest.mark.parametrize("kind", ["reset", "html", "full"])
def test_what_was_there_is_not_lost_by_a_failed_download(
    kind: str, packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep half an archive that somebody is copying, and a damaged file that may be useful."""
    root = tmp_path / "made"
    half, damaged = root / CIFAR10.filename, root / CIFAR10.base_folder / "test_batch"
    half.write_bytes(packed[:1000])
    damaged.write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    serve(monkeypatch, b"<html>" if kind == "html" else packed, breaks=kind == "reset")
    if kind == "full":

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
    reason = {"reset": "reset by peer", "html": "corrupted", "full": "No space left"}[kind]
    refused(make_source("cifar10", root, 32, None), rf"test_batch, and downl.*{reason}", lambda s: s.prepare(True))
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_folders_made_for_a_failed_download_are_removed(
    packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    refused(make_source("cifar10", tmp_path / "a/b/c", 32, None), "no route", lambda source: source.prepare(True))
    assert not (tmp_path / "a").exists()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.size = 4 if kind == tarfile.REGTYPE else 0
    return info


def hostile_archive(made: Path, outside: Path, *, whole: bool) -> bytes:
    """Make members that would land outside; with ``whole`` also the wanted files, else links with their names."""
    buffer = io.BytesIO()
    folder = CIFAR10.base_folder
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(member("../evil"), io.BytesIO(b"evil"))
        tar.addfile(member(str(outside / "evil")), io.BytesIO(b"evil"))
        tar.addfile(member(f"{folder}/../../evil"), io.BytesIO(b"evil"))
        tar.addfile(member("out", tarfile.SYMTYPE, str(outside)))
        tar.addfile(member("out/evil"), io.BytesIO(b"evil"))
        tar.addfile(member("pipe", tarfile.FIFOTYPE))
        if whole:
            tar.add(made / folder, arcname=folder)
        else:
            tar.addfile(member(folder, tarfile.SYMTYPE, str(outside)))
            tar.addfile(member(f"{folder}/test_batch", tarfile.SYMTYPE, str(outside / "victim")))
            tar.addfile(member(f"{folder}/batches.meta", tarfile.LNKTYPE, str(outside / "victim")))
            tar.addfile(member(f"{folder}/data_batch_1"), io.BytesIO(b"evil"))
    return buffer.getvalue()


@pytest.mark.parametrize("whole", [True, False])
def test_no_member_of_an_archive_lands_outside(
    whole: bool, packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = tmp_path / "deep" / "root", tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("unharmed")
    content = hostile_archive(tmp_path / "made", outside, whole=whole)
    trust(monkeypatch, content, tmp_path)
    serve(monkeypatch, content)
    source = make_source("cifar10", root, 32, None)
    if whole:
        source.prepare(download=True)
        assert names(root) == COMPLETE
    else:
        refused(source, "data_batch_1 in the archive has the wrong checksum", lambda source: source.prepare(True))
        assert names(root) == {CIFAR10.filename, CIFAR10.base_folder}
    assert names(outside) == {"victim"} and (outside / "victim").read_text() == "unharmed"
    assert names(tmp_path / "deep") == {"root", *(f"root/{name}" for name in names(root))}
    assert not any(path.is_symlink() for path in root.rglob("*"))


def test_an_archive_without_the_files_is_one_line(
    packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = formats.archive(tmp_path / "made" / CIFAR10.base_folder / "test_batch")
    trust(monkeypatch, content, tmp_path)
    serve(monkeypatch, content)
    refused(make_source("cifar10", tmp_path / "root", 32, None), "gz lacks ", lambda source: source.prepare(True))

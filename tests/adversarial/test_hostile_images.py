"""Malicious image files, and files that are not what their names say: one line names each, nothing hangs."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import signal
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from localfeat.data.bad_files import BadImage
from localfeat.data.datamodule import ImageDataModule
from localfeat.data.decode import FORMATS, MAX_PIXELS, image_size, read_image
from localfeat.data.files import list_images
from localfeat.data.image_folder import ImageFolder
from localfeat.utils.errors import RunFailed, UserError
from tests.helpers.formats import write_image_folder

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
NASTY = "a\nb\x1b[31m\u202e"


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """Return a grey PNG whose header claims a size, with no pixels unless ``chunks`` hold them."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def tiff(width: int, height: int) -> bytes:
    values = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + b"\0" * 4


def webp(width: int, height: int) -> bytes:
    payload = b"\x2f" + struct.pack("<I", (width - 1) | ((height - 1) << 14)) + b"\0" * 21
    return b"RIFF" + struct.pack("<I", 12 + len(payload)) + b"WEBPVP8L" + struct.pack("<I", len(payload)) + payload


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + b"\0" * 6 + b";"


def ppm(width: int, height: int) -> bytes:
    return b"P6 %d %d 255\n" % (width, height)


@pytest.mark.parametrize("side", [12_000, 16_000])
@pytest.mark.parametrize("write", [png, bmp, tiff, webp, ppm])
def test_an_image_bomb_is_refused_by_its_header(write: Callable[[int, int], bytes], side: int, tmp_path: Path) -> None:
    """The file has no pixels, so a check after the header would fail differently. PIL only warns about 12,000 px."""
    file = tmp_path / "bomb.png"
    file.write_bytes(write(side, side))
    for read in (read_image, image_size):
        with pytest.raises(BadImage, match=r"bomb\.png: it has more than 100,000,000 pixels, which is the limit; "):
            read(file)
    assert side**2 > MAX_PIXELS
    file.write_bytes(write(9_000, 9_000))
    assert image_size(file) == (9_000, 9_000)


def test_a_bomb_in_a_png_s_text_is_refused(tmp_path: Path) -> None:
    text = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 50_000_000, 9))
    (tmp_path / "x.png").write_bytes(png(4, 4, text))
    with pytest.raises(BadImage, match="too large"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("content", [EPS, b"8BPS\0\1" + b"\0" * 40, b"<svg/>", b"%PDF-1.4\n"])
def test_only_formats_of_the_suffixes_are_opened(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(content)
    if content == EPS:
        assert Image.open(tmp_path / "x.png").format == "EPS"  # loading it would start ghostscript
    with pytest.raises(BadImage, match=r"x\.png: it is none of PNG, JPEG, BMP, WEBP, TIFF, PPM, GIF") as error:
        read_image(tmp_path / "x.png")
    assert "\n" not in str(error.value)


def make_special(kind: str, path: Path) -> None:
    """Make a special file with the name of an image."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(os.path.relpath(path))  # a socket's name is at most 100 bytes long
    else:
        targets = {"dangling": "nowhere.png", "loop": path.name, "device": "/dev/zero"}
        path.symlink_to(targets[kind])


@pytest.mark.parametrize("kind", ["pipe", "socket", "dangling", "loop", "device"])
def test_what_is_no_file_is_named_before_anything_is_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image_folder(tmp_path, {"train": 2, "test": 1})
    place = tmp_path / "train" / "class_1" / "x.png"
    monkeypatch.chdir(place.parent)
    make_special(kind, place)
    what = "a link that does not lead to a file" if place.is_symlink() else "a pipe, socket or device"
    for read in (lambda: ImageFolder(tmp_path, 16), lambda: list_images(tmp_path)):
        with pytest.raises(BadImage, match=rf"train/class_1/x\.png: it is {what}; replace or delete it"):
            read()
    assert len(ImageFolder(tmp_path, 16, skip_bad=True).load("train")) == 6
    assert capsys.readouterr().err.count("x.png") == 1


def test_what_has_become_a_pipe_meanwhile_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(BadImage, match="not a regular file"):
        read_image(tmp_path / "x.png")


def test_folders_with_an_image_s_name_are_folders(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"train": 2, "test": 1})
    inner = tmp_path / "train" / "class_0" / "more.png"
    inner.mkdir()
    shutil.copy(tmp_path / "train" / "class_0" / "00000.png", inner / "deep.png")
    (tmp_path / "train" / "class_0" / "up.png").symlink_to(
        tmp_path, target_is_directory=True
    )  # a loop for those who follow
    assert len(list_images(tmp_path)) == 10 and ImageFolder(tmp_path, 16).size("train") == 7


def test_names_that_would_break_a_line_are_escaped(tmp_path: Path) -> None:
    for name in (NASTY, os.fsdecode(b"\xff")):
        file = tmp_path / f"{name}.png"
        file.write_bytes(b"no image")
        for read, path in ((read_image, file), (image_size, tmp_path / f"gone {name}.png")):
            with pytest.raises((BadImage, RunFailed)) as error:
                read(path)
            assert str(error.value).isprintable() and tmp_path.name in str(error.value)
    (tmp_path / f"{NASTY}.png").unlink()
    (tmp_path / f"{NASTY}.png").symlink_to("nowhere")
    with pytest.raises(BadImage, match=r"a\\nb\\x1b\[31m\\u202e\.png") as error:
        list_images(tmp_path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", [NASTY, os.fsdecode(b"caf\xe9")])
def test_a_class_whose_name_does_not_print_is_refused(name: str, tmp_path: Path) -> None:
    """It would break tables and terminals, and could not be written to summary.json after the training."""
    write_image_folder(tmp_path, {"train": 1, "test": 1})
    (tmp_path / "train" / "class_1").rename(tmp_path / "train" / name)
    with pytest.raises(UserError, match="has a name that does not print; rename it") as error:
        ImageFolder(tmp_path, 16)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("root", ["x" * 300, "a\0b", "file/inner"])
def test_roots_that_cannot_be(root: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for make in (lambda: ImageFolder(tmp_path / root, 16), lambda: list_images(tmp_path / root)):
        with pytest.raises(UserError, match=r"no such folder|no folder") as error:
            make()
        assert str(error.value).isprintable()


def test_damaged_files_of_all_formats_are_read_or_named(tmp_path: Path) -> None:
    """About 150 files have bytes changed or cut off, for which decoders raise many kinds of exceptions."""
    chance = random.Random(0)
    seeds = [encoded(kind, mode) for kind in FORMATS for mode in ("RGB", "L")]
    file, named = tmp_path / "x.png", 0
    for number in range(150):
        content = bytearray(chance.choice(seeds))
        if number % 3 == 0:
            content = content[: chance.randrange(len(content))]
        for _ in range(number % 4):
            content[chance.randrange(min(60, len(content)))] = chance.choice([0, 255, 128, chance.randrange(256)])
        file.write_bytes(content)
        try:
            pixels = read_image(file, (8, 8))
        except BadImage as error:
            named += 1
            assert str(error).isprintable() and str(file) in str(error)
        else:
            assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    assert 30 < named < 140


def encoded(kind: str, mode: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (11, 17, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def on_disk(root: Path, workers: int, **arguments: Any) -> ImageDataModule:
    return ImageDataModule(
        "image_folder", root, batch_size=2, val_fraction=0, in_memory=False, num_workers=workers, **arguments
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_vanish_in_the_middle_are_one_line(workers: int, tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"train": 20, "test": 1})
    batches = iter(on_disk(tmp_path, workers, skip_bad_images=True).train_dataloader())
    next(batches)
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(
        RunFailed, match=r"train/class_./\d+\.png cannot be read \(No such file or directory\)"
    ) as error:
        list(batches)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_disk_is_one_line_and_no_bad_image(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image_folder(tmp_path, {"train": 2, "test": 1})
    opened = os.open

    def failing(path: Any, *arguments: Any) -> int:
        if str(path).endswith(".png"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, *arguments)

    data = on_disk(tmp_path, workers, skip_bad_images=True)
    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(RunFailed, match=r"\.png cannot be read \(Input/output error\)"):
        list(data.train_dataloader())


@pytest.mark.slow  # DataLoader looks after its workers every five seconds
def test_a_worker_that_is_killed_is_one_line(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"train": 40, "test": 1})
    others = set(active_children())  # of tests before
    batches = iter(on_disk(tmp_path, 1).train_dataloader())
    next(batches)
    (worker,) = set(active_children()) - others
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises wherever this process just is
    try:
        os.kill(worker.pid or 0, signal.SIGKILL)
        with pytest.raises(RunFailed, match=r"a process that reads images has died.*num_workers") as error:
            list(batches)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)), EOFError()])
def test_a_worker_killed_while_its_batch_is_handed_over_is_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(loader: DataLoader[Any]) -> Iterator[Any]:
        raise error
        yield

    write_image_folder(tmp_path, {"train": 2, "test": 1})
    batches = on_disk(tmp_path, 1).train_dataloader()
    monkeypatch.setattr(DataLoader, "__iter__", dying)
    with pytest.raises(RunFailed, match=r"^a process that reads images has died.*num_workers") as failed:
        list(batches)
    assert type(error).__name__ in str(failed.value)


def test_workers_leave_signals_to_the_main_process(tmp_path: Path) -> None:
    """Signals from Ctrl-C or a scheduler reach workers, too, but the main process needs them to finish its batch."""
    write_image_folder(tmp_path, {"train": 20, "test": 1})
    others = set(active_children())  # of tests before
    batches = iter(on_disk(tmp_path, 1).train_dataloader())
    next(batches)
    (worker,) = set(active_children()) - others
    sender = os.fork()  # SIGTERM from the parent itself must end the worker
    if sender == 0:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(worker.pid or 0, signum)
        os._exit(0)
    assert os.waitpid(sender, 0)[1] == 0
    assert len(list(batches)) == 29
    assert worker.exitcode in (0, None)


def test_a_worker_ends_when_its_parent_tells_it_to(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"train": 20, "test": 1})
    others = set(active_children())  # of tests before
    batches = iter(on_disk(tmp_path, 1).train_dataloader())
    next(batches)
    (worker,) = set(active_children()) - others
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0

"""metrics.csv when it cannot be written: one line, and all earlier rows stay readable."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from localfeat.run.loggers import metrics_csv
from localfeat.run.loggers.metrics_csv import MetricsCsv, read_rows, read_series
from localfeat.utils.errors import RunFailed, UserError
from tests.helpers.small_disk import fill, small_disk
from tests.helpers.tiny import TinyLearner, loader, trainer

LONG = 1 / 3  # its text takes 18 characters


def pairs(path: Path) -> list[tuple[int, float]]:
    return read_series(path).get("a", [])


def until_it_fails(logger: MetricsCsv, said: str, steps: int = 10_000) -> int:
    """Log rows until one fails with a message that matches ``said``; return its step."""
    for step in range(steps):
        try:
            logger.log_metrics({"a": LONG}, step)
        except RunFailed as error:
            assert str(error) == f"{logger.path} cannot be written ({said})"
            return step
    raise AssertionError("nothing failed")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 64) as folder:
        yield folder


def test_on_a_full_disk_every_row_before_is_there(disk: Path) -> None:
    logger = MetricsCsv(disk)
    failed = until_it_fails(logger, "No space left on device")
    rows = [(step, LONG) for step in range(failed)]
    assert failed > 1000 and pairs(logger.path) == rows
    assert logger.path.read_bytes().endswith(b"\n"), "whole lines only, for other programs"
    for action in (lambda: logger.log_metrics({"a": 1.0}, failed), lambda: logger.log_metrics({"b": 1.0}, failed)):
        with pytest.raises(RunFailed, match="No space left on device"):
            action()
        assert pairs(logger.path) == rows and os.listdir(disk) == ["metrics.csv"]
    logger.finalize("failed")
    assert pairs(logger.path) == rows


def test_a_row_that_grows_on_a_full_disk_stays_as_it_was(disk: Path) -> None:
    logger = MetricsCsv(disk)
    logger.log_metrics({"a": 1.0, "b": 1.0}, 0)
    while logger.path.stat().st_size % 4096 < 4080:  # then LONG needs another page
        logger.log_metrics({"a": 1.0}, len(read_rows(logger.path)))
    fill(disk)
    before = logger.path.read_bytes()
    with pytest.raises(RunFailed, match="No space left on device"):
        logger.log_metrics({"b": LONG})
    assert logger.path.read_bytes() == before


def test_logging_continues_once_there_is_room(disk: Path) -> None:
    logger = MetricsCsv(disk)
    logger.log_metrics({"a": 0.0}, 0)
    filler = fill(disk)
    for step in range(1, 1000):
        try:
            logger.log_metrics({"a": float(step)}, step)
        except RunFailed:
            filler.unlink()
            logger.log_metrics({"a": float(step)}, step)
    assert pairs(logger.path) == [(step, float(step)) for step in range(1000)]


class PartOf:
    """A file that accepts at most ``room`` more bytes, like a nearly full disk."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, content: memoryview) -> int:
        at, size = self.file.tell(), os.fstat(self.file.fileno()).st_size
        taken = min(len(content), size - at + self.room)  # overwriting needs no room
        if taken == 0:
            raise OSError(28, "No space left on device")
        self.room -= max(0, at + taken - size)
        return int(self.file.write(content[:taken]))


@pytest.mark.parametrize("room", range(25))
@pytest.mark.parametrize("step", [1, 2], ids=["again", "new"])
def test_wherever_a_row_is_cut_off_the_file_stays_whole(tmp_path: Path, room: int, step: int) -> None:
    logger = MetricsCsv(tmp_path)
    for number in (0, 1):
        logger.log_metrics({"a": 0.5, "b": 1.0}, number)
    before = logger.path.read_bytes()
    table = logger._table
    assert table is not None
    table._file = PartOf(table._file, room)  # type: ignore[assignment]
    try:
        logger.log_metrics({"a": LONG}, step)
    except RunFailed:
        assert logger.path.read_bytes() == before
    else:
        assert pairs(logger.path)[-1] == (step, LONG) and len(before) + room >= logger.path.stat().st_size
    table._file = table._file.file  # type: ignore[attr-defined]
    logger.log_metrics({"a": 2.0}, 2)
    assert [number for number, _ in pairs(logger.path)] == [0, 1, 2]


def _log_under_a_limit(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does
    failed = until_it_fails(MetricsCsv(folder), "File too large")
    (folder / "failed").write_text(str(failed))


def test_a_limit_of_the_file_size_is_one_line_too(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_log_under_a_limit, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    failed = int((tmp_path / "failed").read_text())
    assert failed > 50 and pairs(tmp_path / "metrics.csv") == [(step, LONG) for step in range(failed)]


MOVED = "another program has moved or changed it"
MEDDLING: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "deleted": (lambda file: file.unlink(), "another program has deleted it; its rows are restored", "run/metrics.csv"),
    "renamed": (lambda file: file.rename(file.with_name("other.csv")), MOVED, "run/other.csv"),
    "the folder renamed": (lambda file: file.parent.rename(file.parent.with_name("r2")), MOVED, "r2/metrics.csv"),
    "replaced": (lambda file: replace(file), MOVED, "run/metrics.csv"),
    "truncated": (lambda file: os.truncate(file, 20), MOVED, ""),
    "appended to": (lambda file: file.open("a").write("x\n"), MOVED, "run/metrics.csv"),
    "the folder deleted": (lambda file: shutil.rmtree(file.parent), MOVED, ""),
}


def replace(file: Path) -> None:
    """Replace the file, as editors do on saving."""
    shutil.copy(file, file.with_name("saved"))
    file.with_name("saved").rename(file)


@pytest.mark.parametrize("name", MEDDLING)
@pytest.mark.parametrize("metrics", [{"a": 2.0}, {"b": 2.0}], ids=["", "new column"])
@pytest.mark.parametrize("closed", [False, True], ids=["", "closed"])
def test_a_file_that_others_meddle_with(tmp_path: Path, name: str, metrics: dict[str, float], closed: bool) -> None:
    meddle, said, rows_in = MEDDLING[name]
    logger = MetricsCsv(tmp_path / "run")
    for step in (0, 1):
        logger.log_metrics({"a": float(step)}, step)
    if closed:
        logger.finalize("success")
    meddle(logger.path)
    if closed and not logger.path.exists():
        said = "No such file or directory"  # its rows are lost
        rows_in = "" if name == "deleted" else rows_in
    elif closed and name == "replaced":
        said = ""
    if said:
        with pytest.raises(RunFailed) as failed:
            logger.log_metrics(metrics, 2)
        assert str(failed.value) == f"{logger.path} cannot be written ({said})"
    if rows_in:
        assert pairs(tmp_path / rows_in)[:2] == [(0, 0.0), (1, 1.0)]


def test_a_file_system_that_is_read_only_is_one_line(disk: Path) -> None:
    (disk / "run").mkdir()
    logger = MetricsCsv(disk / "run")
    logger.log_metrics({"a": 0.0}, 0)
    logger.finalize("success")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for refused in (logger, MetricsCsv(disk / "run"), MetricsCsv(disk / "other")):
        with pytest.raises(RunFailed, match=r"/metrics.csv cannot be written \(Read-only file system\)$"):
            refused.log_metrics({"b": 1.0}, 1)
    assert pairs(logger.path) == [(0, 0.0)]


@pytest.mark.parametrize("number", range(1, 6))
def test_a_new_column_that_cannot_be_written_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    logger = MetricsCsv(tmp_path)
    for step in range(number):
        logger.log_metrics({"a": float(step)}, step)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "replace", fail)
        with pytest.raises(RunFailed, match="No space left on device"):
            logger.log_metrics({"b": 1.0}, number - 1)
    assert pairs(logger.path) == [(step, float(step)) for step in range(number)]
    assert os.listdir(tmp_path) == ["metrics.csv"]
    logger.log_metrics({"b": 1.0}, number)
    assert read_series(logger.path)["b"] == [(number, 1.0)] and len(pairs(logger.path)) == number


def test_rows_are_synced_when_asked_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = MetricsCsv(tmp_path)
    logger.sync()  # nothing yet
    logger.log_metrics({"a": 0.0}, 0)
    synced: list[int] = []
    monkeypatch.setattr(metrics_csv.os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    logger.log_metrics({"a": 0.0}, 1)
    assert synced == [], "a row does not wait for the disk"
    logger.sync()
    logger.finalize("success")
    assert synced == [logger.path.stat().st_ino] * 2

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    logger.log_metrics({"a": 0.0}, 2)
    monkeypatch.setattr(metrics_csv.os, "fsync", fail)
    with pytest.raises(RunFailed, match=r"metrics.csv cannot be written \(Input/output error\)"):
        logger.sync()
    logger.finalize("failed")  # must not hide an earlier error
    logger.log_metrics({"a": 0.0}, 3)
    with pytest.raises(RunFailed, match="Input/output error"):
        logger.finalize("success")


def test_a_shorter_row_half_written_over_a_longer_one_is_left_out(tmp_path: Path) -> None:
    """The process was killed after writing the row and before cutting off the rest of the old one."""
    long, short = f"1,0,{LONG},{LONG}\n", "1,0,0.5,0.5\n"
    (tmp_path / "metrics.csv").write_text(f"step,epoch,a,b\n0,0,1.0,1.0\n{short}{long[len(short) :]}")
    assert pairs(tmp_path / "metrics.csv") == [(0, 1.0), (1, 0.5)]


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00\n", b"a,b\n1,2\n", b"step,a\nx,1\n", b"step,a\n0,\x00y\n", b'step,a\n0,"' + b"9" * 200_000],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content + b"\n")
    with pytest.raises(UserError, match=r"^.*/metrics\.csv") as error:
        read_series(tmp_path / "metrics.csv")
    assert "\n" not in str(error.value)


def test_training_ends_when_the_disk_is_full(disk: Path) -> None:
    (disk / "run").mkdir()
    logger = MetricsCsv(disk / "run")
    learner = TinyLearner(lambda batch: fill(disk) and None if batch == 2 else None)
    with pytest.raises(RunFailed, match=r"metrics.csv cannot be written \(No space left on device\)"):
        trainer(disk, logger=logger, max_epochs=20).fit(learner, loader(20))
    steps = [int(row["step"]) for row in read_rows(logger.path)]
    assert steps == list(range(len(steps))) and 2 < len(steps) < 400

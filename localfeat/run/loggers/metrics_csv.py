"""metrics.csv: every number that a run logs, complete up to the last logged batch however the run ends."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from localfeat.utils.errors import RunFailed, UserError
from localfeat.utils.files import failing_in_one_line, write_whole

FILE_NAME = "metrics.csv"
FIRST_COLUMNS = ["step", "epoch"]

Row = dict[str, Any]


class MetricsCsv(Logger):
    """Writes ``<folder>/metrics.csv``: one row per step, and a new column for every new metric.

    ``step`` counts batches from 0 (Lightning's logger axis), so validation after batch n shares row n-1. All metrics of
    one step share a row. A row reaches the operating system when it is logged, so it survives the death of the process;
    the file is rewritten only for a new column, so the cost of a row does not grow with the file. (Lightning's
    ``CSVLogger`` collects rows in memory and deletes an existing file.)

    A row does not wait for the disk, which would take longer than a small batch: if the machine crashes, rows of the
    last half minute may be lost. Call ``sync()`` before a checkpoint is written; a resumed run then logs every lost row
    again.

    A write error ends the run: a full disk, or a file or folder that was moved, deleted or changed by others. Rows
    logged before stay in the file; a deleted file is written again.

    Args:
        folder: the run's folder; created if missing.
        resume_from_step: for a resumed run, the ``global_step`` of its checkpoint: rows of later batches
            (``step >= resume_from_step``) are dropped because they will be logged again. None for a new run; an
            existing file is kept as ``metrics.1.csv`` (or the next free number).
    """

    def __init__(self, folder: str | Path, *, resume_from_step: int | None = None) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.resume_from_step = resume_from_step
        self._table: _Table | None = None

    @property
    def path(self) -> Path:
        return self.folder / FILE_NAME

    # Lightning writes checkpoints to <save_dir>/<name>/<version>/checkpoints; with empty names, <folder>/checkpoints.
    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def log_dir(self) -> str:
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the run's configuration is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add ``metrics`` to the row of ``step`` (None for the latest row).

        Raises:
            RunFailed: the row cannot be written; the file keeps the rows before it.
            UserError: the file of the resumed run is not a valid metrics.csv.
        """
        with failing_in_one_line(self.path):
            if self._table is None:
                self._table = self._open()
            self._table.write(self._table.latest_step if step is None else step, metrics)

    @rank_zero_only
    def sync(self) -> None:
        """Wait until all rows are on disk.

        Raises:
            RunFailed: the rows cannot be written to the disk.
        """
        with failing_in_one_line(self.path):
            if self._table is not None:
                self._table.sync()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Sync and close the file; the next row opens it again (testing after fitting)."""
        try:
            self.sync()
        except RunFailed:
            if status == "success":  # otherwise an earlier error is being reported
                raise
        finally:
            if self._table is not None:
                self._table.close()

    def _open(self) -> _Table:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.resume_from_step is None:
            set_aside(self.path)
            return _Table(self.path, [])
        rows = [row for row in read_rows(self.path) if int(row["step"]) < self.resume_from_step]
        return _Table(self.path, rows)


class _Table:
    """An open CSV file whose last row can still grow; the rows before it are not held in memory.

    A method that raises leaves the file and this object unchanged.
    """

    columns: list[str]
    _file: io.FileIO
    _last: Row  # the row that can still grow, without empty values
    _last_line: bytes  # the same row, as encoded in the file
    _last_offset: int
    _end: int

    def __init__(self, path: Path, rows: list[Row]) -> None:
        self.path = path
        self._rewrite(columns_of(rows), rows)

    @property
    def latest_step(self) -> int:
        return int(self._last.get("step", 0))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._check()
        row: Row = {"step": step, **metrics}
        again = bool(self._last) and step == self.latest_step
        if again:
            row = {**self._last, **row}
        if set(row) <= set(self.columns):
            self._put(row, self._last_offset if again else self._end)
        else:
            rows: list[Row] = [*read_rows(self.path)]
            columns = columns_of([dict.fromkeys(self.columns), row])
            before = self._file
            self._rewrite(columns, [*(rows[:-1] if again else rows), row])
            before.close()

    def sync(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _check(self) -> None:
        """Refuse a file that was moved, deleted or changed by others, because rows written there would be lost.

        This costs two system calls per row. The rows of a deleted file are recovered from its descriptor.
        """
        if self._file.closed:
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115  (it stays open)
        ours = os.fstat(self._file.fileno())
        named = self.path.stat() if self.path.exists() else None
        if named is not None and os.path.samestat(ours, named) and ours.st_size == self._end:
            return
        reason = "another program has moved or changed it"
        if named is None and ours.st_nlink == 0 and self.path.parent.is_dir():
            self._file.seek(0)
            write_whole(self.path, self._file.readall())
            reason = "another program has deleted it; its rows are restored"
        raise RunFailed(f"{self.path} cannot be written ({reason})")

    def _put(self, row: Row, offset: int) -> None:
        """Write ``row`` at ``offset`` as the end of the file, over or after the last row."""
        line = encode([row], self.columns)
        try:
            self._overwrite(offset, line)
        except BaseException:  # also Ctrl-C
            with suppress(OSError):  # these bytes have their place on the disk, even a full one
                self._overwrite(self._last_offset, self._last_line)
            raise
        self._last, self._last_line, self._last_offset, self._end = row, line, offset, offset + len(line)

    def _overwrite(self, offset: int, line: bytes) -> None:
        """Make ``line`` the end of the file, unbuffered, so that a kill loses nothing."""
        self._file.seek(offset)
        rest = memoryview(line)
        while rest:  # a nearly full disk takes a part, then fails
            rest = rest[self._file.write(rest) :]
        self._file.truncate()

    def _rewrite(self, columns: list[str], rows: list[Row]) -> None:
        head, line = encode_header(columns) + encode(rows[:-1], columns), encode(rows[-1:], columns)
        write_whole(self.path, head + line)
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115  (it stays open)
        self.columns = columns
        self._last = {key: value for key, value in rows[-1].items() if value != ""} if rows else {}
        self._last_line, self._last_offset, self._end = line, len(head), len(head) + len(line)


def columns_of(rows: list[Row]) -> list[str]:
    """Return ``step``, ``epoch``, then all other columns by name."""
    return [*FIRST_COLUMNS, *sorted({key for row in rows for key in row} - set(FIRST_COLUMNS))]


def encode_header(columns: list[str]) -> bytes:
    return encode([dict(zip(columns, columns, strict=True))], columns)


def encode(rows: list[Row], columns: list[str]) -> bytes:
    """Return ``rows`` as CSV lines in UTF-8 without a header; missing values are empty."""
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Return all complete rows of a metrics.csv as text; none if the file does not exist.

    Lines that a crash cut off are skipped: a last line without a line break, and lines with fewer fields than columns
    (a shorter row was being written over a longer one, which never leaves all commas).

    Raises:
        UserError: ``MetricsCsv`` did not write this file, or it is damaged.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        lines = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        columns = next(lines, FIRST_COLUMNS)
        rows = [dict(zip(columns, line, strict=True)) for line in lines if len(line) == len(columns)]
        for row in rows:
            int(row["step"])
    except (ValueError, KeyError, csv.Error, IsADirectoryError) as error:
        raise UserError(f"{path} is damaged, or not a metrics.csv ({type(error).__name__}: {error})") from error
    return rows


def read_series(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Return column name -> [(step, value), …] for every number in a metrics.csv, without ``step`` itself.

    Raises:
        UserError: see :func:`read_rows`, or a value is not a number.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for row in read_rows(path):
        step = int(row.pop("step"))
        for name, text in row.items():
            if text:
                series.setdefault(name, []).append((step, _number(text, f"{path}: {name} of step {step}")))
    return series


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{where} is {text!r}, which is not a number") from error


def set_aside(path: Path) -> None:
    """Rename an existing ``metrics.csv`` to the first free ``metrics.<n>.csv``."""
    if path.exists():
        number = 1
        while (target := path.with_suffix(f".{number}{path.suffix}")).exists():
            number += 1
        path.rename(target)

"""metrics.csv: every logged number of a run, complete up to the last logged batch even after a crash."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

FILE_NAME = "metrics.csv"
FIRST_COLUMNS = ["step", "epoch"]

Row = dict[str, Any]


class MetricsCsv(Logger):
    """Writes ``<folder>/metrics.csv``: one row per step, new columns when new metrics turn up.

    ``step`` counts batches from 0 (Lightning's logger axis), so validation after batch n shares row n-1. What is
    logged twice for one step goes into one row. A row reaches the operating system when it is logged; the file is
    only rewritten when a column is new, so the cost of a row does not grow with the file. Lightning's ``CSVLogger``
    collects rows in memory and deletes an earlier file.

    Args:
        folder: the run's folder; made if it does not exist.
        resume_from_step: for a resumed run, the number of batches behind its checkpoint (``global_step``): rows of
            later batches (``step >= resume_from_step``), logged before the run was killed, are dropped because they
            come again. None: a new run; an existing file is kept as ``metrics.1.csv`` (or the next free number).
    """

    def __init__(self, folder: str | Path, *, resume_from_step: int | None = None) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.resume_from_step = resume_from_step
        self._table: _Table | None = None

    @property
    def path(self) -> Path:
        return self.folder / FILE_NAME

    # Lightning puts checkpoints into <save_dir>/<name>/<version>/checkpoints: with empty names, <folder>/checkpoints.
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
        """Writes nothing: the run's configuration is config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds ``metrics`` to the row of ``step`` (None: to the latest row)."""
        if self._table is None:
            self._table = self._open()
        self._table.write(self._table.latest_step if step is None else step, metrics)

    @rank_zero_only
    def finalize(self, status: str) -> None:
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
    """An open CSV file whose last row can still grow. Rows before it are on disk and not held in memory."""

    def __init__(self, path: Path, rows: list[Row]) -> None:
        self.path = path
        self.columns = columns_of(rows)
        self._file = self._rewrite(rows)

    @property
    def latest_step(self) -> int:
        return int(self._last.get("step", 0))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        row: Row = {"step": step, **metrics}
        again = bool(self._last) and step == self.latest_step
        if again:
            row = {**self._last, **row}
        if set(row) <= set(self.columns):
            self._put(row, self._last_offset if again else self._end)
        else:
            rows: list[Row] = [*read_rows(self.path)]
            self.columns = columns_of([dict.fromkeys(self.columns), row])
            self._file.close()
            self._file = self._rewrite([*(rows[:-1] if again else rows), row])

    def _put(self, row: Row, offset: int) -> None:
        """Writes ``row`` at ``offset``, as the end of the file: over the last row or behind it."""
        line = encode([row], self.columns)
        if self._file.closed:
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115  (it stays open)
        self._file.seek(offset)
        self._file.write(line)  # unbuffered: one write to the operating system, so that a kill loses no row
        self._file.truncate()
        self._last, self._last_offset, self._end = row, offset, offset + len(line)

    def close(self) -> None:
        """Flush to disk and let go of the file; the next row opens it again (testing after fitting)."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def _rewrite(self, rows: list[Row]) -> io.FileIO:
        head = encode_header(self.columns) + encode(rows[:-1], self.columns)
        content = head + encode(rows[-1:], self.columns)
        temporary = self.path.with_suffix(".csv.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, self.path)
        self._last_offset, self._end = len(head), len(content)
        self._last = {key: value for key, value in rows[-1].items() if value != ""} if rows else {}
        return open(self.path, "r+b", buffering=0)


def columns_of(rows: list[Row]) -> list[str]:
    """``step``, ``epoch``, then everything else by name."""
    return [*FIRST_COLUMNS, *sorted({key for row in rows for key in row} - set(FIRST_COLUMNS))]


def encode_header(columns: list[str]) -> bytes:
    return encode([dict(zip(columns, columns, strict=True))], columns)


def encode(rows: list[Row], columns: list[str]) -> bytes:
    """``rows`` as CSV lines, UTF-8, without a header; missing values are empty."""
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """All complete rows of a metrics.csv, as text; none if there is no file. A line cut off by a crash is left out."""
    path = Path(path)
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(io.StringIO(complete, newline="")))


def read_series(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Column name -> [(step, value), …] for every number in a metrics.csv, ``step`` itself left out."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in read_rows(path):
        step = int(row.pop("step"))
        for name, value in row.items():
            if value:
                series.setdefault(name, []).append((step, float(value)))
    return series


def set_aside(path: Path) -> None:
    """Renames an existing ``metrics.csv`` to the first free ``metrics.<n>.csv``."""
    if path.exists():
        number = 1
        while (target := path.with_suffix(f".{number}{path.suffix}")).exists():
            number += 1
        path.rename(target)

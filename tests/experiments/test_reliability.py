"""The suites of faults and kills: one row of each here, all rows in the slow tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.reliability import faults, forks
from experiments.reliability.injections import trial
from experiments.reliability.injections.trial import Ended, UnexpectedError, one_line

ROOT = Path(__file__).resolve().parents[2]
LEAN = ["last.ckpt is all zeros"]


@pytest.fixture
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget cached uninterrupted runs, as other tests' folders may be gone."""
    monkeypatch.setattr(trial, "_WHOLE", {})
    monkeypatch.setattr(trial, "_CUT", {})
    yield


@pytest.mark.slow
def test_a_row_of_the_table(tmp_path: Path, nothing_remembered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    chosen = [fault for fault in faults.FAULTS if fault[0] in LEAN]
    rows = [faults.attempt(faults.FAULTS.index(fault), tmp_path / str(number)) for number, fault in enumerate(chosen)]
    assert len(rows) == len(LEAN) and all(row.ok for row in rows), "\n".join(map(faults.line_of, rows))
    assert all("identical" in row.seen for row in rows)


def test_names_of_faults_are_told_apart() -> None:
    names = [fault[0] for fault in faults.FAULTS]
    assert len(set(names)) == len(names) > 50


@pytest.mark.parametrize(
    ("code", "errors", "reason"),
    [
        (1, "error: full\n", None),
        (0, "error: full\n", "exit code 0, not 1"),
        (1, "error: full\nmore\n", "no single last line"),
        (1, "error: one\nerror: two\n", "no single last line"),
        (1, "Traceback (most recent call last):\nerror: full\n", "a stack trace"),
        (1, "error: other\n", "'full' is not in its last line"),
    ],
)
def test_what_one_line_is(code: int, errors: str, reason: str | None) -> None:
    ended = Ended(code, "", errors, 0.0)
    if reason is None:
        assert one_line(ended, 1, "full") == "error: full"
        return
    with pytest.raises(UnexpectedError, match=reason):
        one_line(ended, 1, "full")


def test_what_is_unexpected_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(place: Path) -> str:
        raise UnexpectedError("exit code 3")

    monkeypatch.setattr(faults, "FAULTS", [("a fault", "nothing", wrong)])
    row = faults.attempt(0, tmp_path)
    assert row.ok is False and row.seen == "NOT AS EXPECTED: exit code 3"


def test_files_that_are_cut_are_seen(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,epoch\n0,0\n1")
    (tmp_path / "summary.json").write_text("{")
    assert [line.partition(":")[0] for line in forks.unreadable(tmp_path)] == ["summary.json", "metrics.csv"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("script", [["faults.py"], ["kills.py", "kills=6"]])
def test_the_whole_suite(script: list[str], tmp_path: Path) -> None:
    """Copy the script, as it writes its results next to itself."""
    copy = tmp_path / "experiments" / "reliability"
    copy.mkdir(parents=True)
    for file in (ROOT / "experiments" / "reliability").rglob("*.py"):
        target = copy / file.relative_to(ROOT / "experiments" / "reliability")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    command = [sys.executable, str(copy / script[0]), str(tmp_path / "runs"), *script[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    assert (copy / "results" / script[0].replace(".py", ".md")).is_file()

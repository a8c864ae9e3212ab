"""The soak test measures correctly and detects growth."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.reliability.soak import Reading, compared, holds, reading, table
from tests.helpers.project import ROOT

IN_A_PROCESS = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from experiments.reliability.soak import soak
found = soak(Path(sys.argv[1]), 480, 0)
Path(sys.argv[2]).write_text(json.dumps([asdict(reading) for reading in found]))
"""


def readings(growth: float = 0.0, descriptors: int = 0) -> list[Reading]:
    """Return readings up to batch 2,000, with memory and descriptors that grow from batch 300 on."""
    begin = Reading(0, 800_000, 500_000, 13, 4, 600_000, 40_000)
    found = [replace(begin, batch=batch) for batch in range(20, 2001, 20)]
    return [
        r if r.batch < 300 else replace(r, resident=int(800_000 * (1 + growth)), descriptors=13 + descriptors)
        for r in found
    ]


@pytest.mark.parametrize(
    ("growth", "descriptors", "right"),
    [(0, 0, True), (0.009, 0, True), (0.011, 0, False), (-0.02, 0, False), (0, 1, False)],
)
def test_growth_is_found(growth: float, descriptors: int, right: bool) -> None:
    assert holds(compared(readings(growth, descriptors))) == right
    assert f"{100 * growth:+.2f} %" in table(readings(growth, descriptors))


def test_a_run_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="batches are too few"):
        compared(readings()[:18])


def test_a_reading_sees_memory_and_descriptors(tmp_path: Path) -> None:
    """Read before and after mapping new pages, as memory from malloc may have been resident before."""
    before = reading(0)
    held = mmap.mmap(-1, 2**25, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.write(bytes(2**25 - 1) + b"x")
    with (tmp_path / "file").open("w"):
        after = reading(1)
    assert after.descriptors == before.descriptors + 1 and len(held) == 2**25
    assert after.resident - before.resident > 30 * 1024 and after.anonymous - before.anonymous > 30 * 1024


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_soak_holds(tmp_path: Path) -> None:
    """Run in a separate process, as one filled by other tests returns memory at any time."""
    environment = {**os.environ, "FORCE_COLOR": "", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path / "soak"), str(tmp_path / "readings.json")]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    found = [Reading(**values) for values in json.loads((tmp_path / "readings.json").read_text())]
    assert [r.batch for r in found] == list(range(20, 481, 20))
    assert holds(compared(found)), table(found)
    assert all(r.service > 0 for r in found), "W&B's service is seen"
    assert "images/s" in (tmp_path / "soak" / "output.txt").read_text()

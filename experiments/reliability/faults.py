"""Real faults in real runs: how each run ends, and whether anything is lost once the fault is gone.

    python experiments/reliability/faults.py <folder> [only=<text>] [processes=2]

Every row of the table is one fault, injected into small runs of the command line, each in its own process: full and
read-only disks, errors of single system calls, signals, non-finite numbers, a dead W&B, damaged files, runs side by
side, killed workers. A run that ends by a fault must say so in one line; then the fault is removed, and the same
command must end bit for bit like a run without faults (``forks.differences``). Writes faults.json and faults.md into
experiments/reliability/results, unless only=<text> selects the rows whose name contains it. Exits with 1 if a row is
not as expected. Mounting disks needs root: without it these rows say "not run".
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from experiments.reliability.injections import (
    calls,
    damage,
    disks,
    images,
    loggers,
    numbers,
    processes,
    signals,
)
from experiments.reliability.injections.trial import (
    QUICK,
    NotPossibleError,
    Row,
    UnexpectedError,
)
from localfeat.run.command import main as run_main
from localfeat.run.command_line import parse_arguments
from localfeat.run.signals import heed_signals
from localfeat.run.summary import environment
from localfeat.utils.files import write_whole

RESULTS = Path(__file__).parent / "results"
GROUPS = [calls, numbers, loggers, disks, signals, damage, images, processes]  # the longest come first
Fault = tuple[str, str, Callable[[Path], str]]
FAULTS: list[Fault] = [fault for group in GROUPS for fault in group.FAULTS]


def main() -> None:
    """Run the command line."""
    given = [f"folder={a}" if "=" not in a and not a.startswith("-") else a for a in sys.argv[1:]]
    values = parse_arguments(__doc__ or "", {"folder": ..., "only": "", "processes": "2"}, given)
    chosen = [fault for fault in FAULTS if values["only"] in fault[0]]
    heed_signals()
    rows = inject(chosen, Path(values["folder"]).absolute(), int(values["processes"]))
    if not values["only"]:
        write_results(rows)
    sys.exit(not rows or any(row.ok is False for row in rows))


def inject(chosen: list[Fault], folder: Path, processes: int = 1) -> list[Row]:
    """Inject each fault and return its row, in the order of the list; print the rows as they come."""
    warm(folder)
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        places = [folder / f"{FAULTS.index(fault):03}" for fault in chosen]
        rows = []
        for row in pool.map(attempt, [FAULTS.index(fault) for fault in chosen], places):
            print(line_of(row), flush=True)
            rows.append(row)
    return rows


def warm(folder: Path) -> None:
    """Import everything that the forks need by one run in this process, and leave them no garbage to collect."""
    torch.set_num_threads(1)
    before = sys.argv
    sys.argv = ["localfeat.run", *QUICK, "epochs=1", f"hydra.run.dir={folder}/warm_{os.getpid()}_{time.time_ns()}"]
    try:
        run_main()
    finally:
        sys.argv = before
    gc.collect()
    gc.freeze()


def attempt(number: int, place: Path) -> Row:
    """Inject one fault and return its row."""
    fault, expected, make = FAULTS[number]
    begun = time.perf_counter()
    ok: bool | None = False
    try:
        seen, ok = make(place), True
    except NotPossibleError as reason:
        seen, ok = f"not run: {reason}", None
    except UnexpectedError as found:
        seen = f"NOT AS EXPECTED: {' '.join(str(found).split())}"
    except Exception as error:
        seen = f"NOT AS EXPECTED: {type(error).__name__}: {' '.join(str(error).split())}"
    return Row(fault, expected, seen, ok, round(time.perf_counter() - begun, 1))


def line_of(row: Row) -> str:
    """Format a row of the table."""
    cells = (text.replace("|", "/") for text in (row.fault, row.expected, row.seen))
    return f"| {' | '.join(cells)} |"


def write_results(rows: list[Row]) -> None:
    """Write the table and its JSON version."""
    versions = environment()["versions"]
    wrong, left_out = (sum(row.ok is ok for row in rows) for ok in (False, None))
    lines = [
        f"# {len(rows)} faults: {wrong} not as expected, {left_out} not run",
        "",
        "Written by `python experiments/reliability/faults.py <folder>`; the [page above](../README.md) explains it.",
        f"torch {versions['torch']}, lightning {versions['lightning']}.",
        f"{sum(row.seconds for row in rows):.0f} s of work.",
        "",
        "| fault | expected | seen |",
        "|---|---|---|",
        *map(line_of, rows),
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    write_whole(RESULTS / "faults.md", "\n".join(lines).encode())
    content = {"versions": versions, "rows": [asdict(row) for row in rows]}
    write_whole(RESULTS / "faults.json", (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

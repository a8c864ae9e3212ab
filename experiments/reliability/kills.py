"""Kill -9 at random moments: every run resumed afterwards ends bit for bit like the uninterrupted one.

    python experiments/reliability/kills.py <folder> [kills=50] [seed=0]

Twelve small runs over all methods, in fp32 and bf16, with one, two and four local modules, averaged weights and
accumulated gradients. Each is trained once without interruption, then again by the same command with resume=auto, which
is killed at a random moment and started again, up to three times, before it may finish; this repeats until there are
enough kills. Every third moment is uniform over the duration of the uninterrupted run, from the process's start; the
others come a few milliseconds after a row of metrics.csv, chosen among those still to be written. After every kill each
file of the folder is read. Writes kills.json and kills.md into experiments/reliability/results, and leaves the runs in
<folder>.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.reliability.forks import SMALL, differences, end_of, rows_of, start, unreadable
from localfeat.run.command_line import parse_arguments
from localfeat.run.folder import RunFolder
from localfeat.run.loggers.metrics_csv import read_rows
from localfeat.run.summary import environment
from localfeat.utils.files import write_whole

RESULTS = Path(__file__).parent / "results"
BF16, EMA = "trainer.precision=bf16-mixed", "callbacks.ema=0.8"
EVERY = "callbacks.checkpoint_every_n_batches="
SWIN = ["dataset.augmentation=swin", "dataset.mixup=0.5"]


def _twice(*more: str) -> list[str]:
    return ["optimizer.accumulate=2", *more]


CASES = {
    "e2e": ["method=e2e", f"{EVERY}2"],
    "e2e bf16 ema, swin augmentation, mixup": ["method=e2e", BF16, EMA, *SWIN, f"{EVERY}1"],
    "greedy_ce K=2 accumulate 2": ["method=greedy_ce", "split=k2", *_twice(f"{EVERY}1")],
    "greedy_ce K=4 bf16": ["method=greedy_ce", BF16, f"{EVERY}3"],
    "greedy_contrast K=2 bf16 ema, accumulate 2": [
        "method=greedy_contrast",
        "split=k2",
        BF16,
        EMA,
        *_twice(f"{EVERY}1"),
    ],
    "greedy_contrast K=4": ["method=greedy_contrast"],
    "image_recon K=4 ema": ["method=image_recon", EMA, f"{EVERY}1"],
    "image_recon K=2 bf16": ["method=image_recon", "split=k2", BF16, f"{EVERY}2"],
    "feature_recon K=4 bf16 ema accumulate 2": [BF16, EMA, *_twice(f"{EVERY}1")],
    "feature_recon K=4": [f"{EVERY}1", "callbacks.early_stopping=9"],
    "feature_recon K=1": ["split=even", "split.modules=1", f"{EVERY}2"],
    "feature_recon_ce K=2 accumulate 2, lean": [
        *("method=feature_recon_ce", "split=k2", "efficiency=lean"),
        *_twice(f"{EVERY}3"),
    ],
}

LONGEST_CHAIN = 3  # kills of one run
ROWS = 22  # rows of the final metrics.csv: 21 batches and the test


@dataclass
class Kill:
    """One kill: seconds after the process started, batches logged by then, files being written."""

    seconds: float
    rows: int
    unfinished_files: list[str]
    unreadable: list[str]


@dataclass
class Outcome:
    """The outcome of one case."""

    case: str
    overrides: list[str]
    seconds: float
    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    different: list[str] = field(default_factory=list)


def main() -> None:
    """Run the command line."""
    values = parse_arguments(__doc__ or "", {"folder": ..., "kills": "50", "seed": "0"}, _named_folder(sys.argv[1:]))
    folder, kills = Path(values["folder"]), int(values["kills"])
    generator = random.Random(int(values["seed"]))
    shares = [kills // len(CASES) + (index < kills % len(CASES)) for index in range(len(CASES))]
    outcomes = []
    for (case, overrides), share in zip(CASES.items(), shares, strict=True):
        outcomes.append(attack(case, overrides, folder / f"{len(outcomes):02}", share, generator))
        print(line_of(outcomes[-1]), flush=True)
    write_results(outcomes, int(values["seed"]))
    sys.exit(any(outcome.different or any(kill.unreadable for kill in outcome.kills) for outcome in outcomes))


def _named_folder(arguments: list[str]) -> list[str]:
    return [f"folder={a}" if "=" not in a and not a.startswith("-") else a for a in arguments]


def attack(case: str, overrides: list[str], folder: Path, kills: int, generator: random.Random) -> Outcome:
    """Train ``case`` once without interruption, then kill it as often as it takes to have ``kills``."""
    command = [*SMALL, *overrides]
    begun = time.perf_counter()
    assert end_of(start([*command, f"hydra.run.dir={folder}/whole"], folder / "whole.log")) == 0, folder / "whole.log"
    outcome = Outcome(case, overrides, time.perf_counter() - begun)
    while len(outcome.kills) < kills:
        outcome.runs += 1
        killed = folder / f"killed_{outcome.runs}"
        again = [*command, "resume=auto", f"hydra.run.dir={killed}"]
        for _ in range(min(LONGEST_CHAIN, kills - len(outcome.kills))):
            if RunFolder(killed).has_ended() or rows_of(killed / "metrics.csv") >= ROWS - 1:
                break  # only tests and pictures remain
            kill_once(again, killed, outcome, generator)
        if not RunFolder(killed).has_ended():
            assert end_of(start(again, killed.with_suffix(".log"))) == 0, killed
        outcome.different += [f"run {outcome.runs}: {what}" for what in differences(folder / "whole", killed)]
    return outcome


def kill_once(command: list[str], folder: Path, outcome: Outcome, generator: random.Random) -> None:
    """Start the command and kill it at a random moment, unless it ends before."""
    begun = time.perf_counter()
    child = start(command, folder.with_suffix(".log"))
    if wait_for_moment(child, folder, outcome, generator):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        outcome.kills.append(look(folder, time.perf_counter() - begun))


def wait_for_moment(child: int, folder: Path, outcome: Outcome, generator: random.Random) -> bool:
    """Wait for the next moment to kill; return False if the process has ended before."""
    if len(outcome.kills) % 3 == 0:
        time.sleep(generator.uniform(0, outcome.seconds))
        return os.waitpid(child, os.WNOHANG)[0] == 0
    file = folder / "metrics.csv"
    row = generator.randint(min(rows_of(file) + 1, ROWS), ROWS)
    while rows_of(file) < row:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    time.sleep(generator.uniform(0, 0.03))
    return os.waitpid(child, os.WNOHANG)[0] == 0


def look(folder: Path, seconds: float) -> Kill:
    """Inspect what a kill has left behind."""
    parts = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.part")) if folder.is_dir() else []
    rows = len(read_rows(folder / "metrics.csv")) if folder.is_dir() else 0
    return Kill(seconds, rows, parts, list(unreadable(folder)))


def line_of(outcome: Outcome) -> str:
    """Format a row of the table."""
    rows = ", ".join(str(kill.rows) for kill in outcome.kills)
    writing = sum(bool(kill.unfinished_files) for kill in outcome.kills)
    unreadable_files = sum(len(kill.unreadable) for kill in outcome.kills)
    end = "identical" if not outcome.different else f"DIFFERENT: {'; '.join(outcome.different)}"
    return f"| {outcome.case} | {len(outcome.kills)} | {rows} | {writing} | {unreadable_files} | {end} |"


def write_results(outcomes: list[Outcome], seed: int) -> None:
    """Write the table and its JSON version."""
    found = environment()
    total = sum(len(outcome.kills) for outcome in outcomes)
    lines = [
        f"# {total} kills at random moments",
        "",
        "Written by `python experiments/reliability/kills.py <folder>`: see there what is compared.",
        f"torch {found['versions']['torch']}, lightning {found['versions']['lightning']}, seed {seed}.",
        "",
        "| run | kills | rows in metrics.csv then (of 22) | while a file was written | unreadable files | at the end |",
        "|---|---|---|---|---|---|",
        *map(line_of, outcomes),
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    write_whole(RESULTS / "kills.md", "\n".join(lines).encode())
    content = {"seed": seed, "versions": found["versions"], "outcomes": [asdict(outcome) for outcome in outcomes]}
    write_whole(RESULTS / "kills.json", (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

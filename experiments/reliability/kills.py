"""Kill -9 at random moments: every run resumed afterwards ends bit for bit as the one that nobody killed.

    python experiments/reliability/kills.py <folder> [kills=50] [seed=0]

Twelve small runs over all methods, in fp32 and bf16, with one, two and four local modules, averaged weights and
accumulated gradients. Each is trained once without interruption, then again by the same command with resume=auto, which
is killed at a random moment, begun again, killed again … and in the end left alone. Every third moment is uniform over
the time that the uninterrupted run took, from the process's beginning; the others come some milliseconds after a row of
metrics.csv, chosen among those still to be written. After every kill each file of the folder is read. Writes kills.json
and kills.md into experiments/reliability/results, and leaves the runs in <folder>.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from localfeat.artifacts.checkpoint_files import read_checkpoint
from localfeat.artifacts.metrics_csv import read_rows
from localfeat.artifacts.summary import environment
from localfeat.cli import parse_arguments
from localfeat.config import saved_config
from localfeat.run import main as run_main
from localfeat.run_folder import CONFIG, SUMMARY, has_ended
from localfeat.writing import write_whole

RESULTS = Path(__file__).parent / "results"
SMALL = [
    "backbone=swin_micro",
    "backbone.arguments.embed_dim=8",
    "backbone.arguments.depths=[1,1,1,1]",
    "backbone.arguments.num_heads=[1,1,2,2]",
    "backbone.drop_path_rate=0.2",
    "trainer=cpu",
    "batch_size=16",
    "epochs=3",
    "callbacks.progress_bar=false",
    "trainer.limit_train_batches=7",
    "trainer.limit_val_batches=3",
    "trainer.limit_test_batches=3",
    "trainer.log_every_n_steps=1",
]
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

ROWS = 22  # of metrics.csv in the end: 21 batches and the test
TIMED_COLUMNS = {"speed/images_per_second", "speed/outside_step"}
OWN_TO_A_PROCESS = {"seconds", "images_per_second", "commit", "command", "overrides"}
"""What no two runs can share: wall time, the command as typed, and its folder."""


@dataclass
class Kill:
    """One moment: seconds after the process began, batches logged by then, files that it was writing."""

    seconds: float
    rows: int
    unfinished_files: list[str]
    unreadable: list[str]


@dataclass
class Outcome:
    """What became of one case."""

    case: str
    overrides: list[str]
    seconds: float
    kills: list[Kill] = field(default_factory=list)
    attempts: int = 0
    different: list[str] = field(default_factory=list)


def main() -> None:
    """The command line."""
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
    """Train ``case`` twice: left alone, and killed ``kills`` times."""
    command = [*SMALL, *overrides]
    begun = time.perf_counter()
    assert end_of(start([*command, f"hydra.run.dir={folder}/whole"], folder / "whole.log")) == 0, folder / "whole.log"
    outcome = Outcome(case, overrides, time.perf_counter() - begun)
    again = [*command, "resume=auto", f"hydra.run.dir={folder}/killed"]
    while not outcome.attempts or not has_ended(folder / "killed"):
        outcome.attempts += 1
        child = start(again, folder / "killed.log")
        if len(outcome.kills) < kills:
            begun = time.perf_counter()
            running = wait_for_moment(child, folder / "killed", outcome, generator)
            seconds = time.perf_counter() - begun
            if running and os.waitpid(child, os.WNOHANG)[0] == 0:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                outcome.kills.append(look(folder / "killed", seconds))
            if has_ended(folder / "killed"):
                (folder / "killed" / SUMMARY).unlink()  # it was faster: it ends once more, from its last checkpoint
        else:
            assert end_of(child) == 0, folder / "killed.log"
    outcome.different = list(differences(folder / "whole", folder / "killed"))
    return outcome


def start(arguments: list[str], log: Path) -> int:
    """``python -m localfeat.run <arguments>`` in a fork of this process; returns its number."""
    log.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    code: Any = 99
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        sys.argv = ["localfeat.run", *arguments]
        run_main()
        code = 0
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait_for_moment(child: int, folder: Path, outcome: Outcome, generator: random.Random) -> bool:
    """Return at the next moment to kill at; False if the process has ended before."""
    if len(outcome.kills) % 3 == 0:
        time.sleep(generator.uniform(0, outcome.seconds))
        return True
    file = folder / "metrics.csv"
    row = generator.randint(min(rows_of(file), ROWS), ROWS)
    while rows_of(file) < row:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    time.sleep(generator.uniform(0, 0.03))
    return True


def rows_of(file: Path) -> int:
    """Lines below the first."""
    return max(0, file.read_bytes().count(b"\n") - 1) if file.exists() else 0


def end_of(child: int) -> int:
    """How it ended: its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def look(folder: Path, seconds: float) -> Kill:
    """What a kill has left."""
    parts = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.part")) if folder.is_dir() else []
    rows = len(read_rows(folder / "metrics.csv")) if folder.is_dir() else 0
    return Kill(seconds, rows, parts, list(unreadable(folder)))


def unreadable(folder: Path) -> Iterator[str]:
    """Every file of a run's folder that is there and cannot be read."""
    readers = {
        CONFIG: lambda file: saved_config(file.parent),
        SUMMARY: lambda file: json.loads(file.read_text()),
        "metrics.csv": whole_rows,
        "backbone.safetensors": load_file,
        "checkpoints/best.ckpt": read_checkpoint,
        "checkpoints/last.ckpt": read_checkpoint,
        "checkpoints/previous.ckpt": read_checkpoint,
    }
    for name, read in readers.items():
        if (folder / name).is_file():
            try:
                read(folder / name)
            except Exception as error:
                yield f"{name}: {error}"


def whole_rows(file: Path) -> None:
    """Refuse a row of metrics.csv with fewer or more values than columns."""
    lines = file.read_text().splitlines()
    widths = {line.count(",") for line in lines}
    if len(widths) > 1:
        raise ValueError(f"rows of {sorted(widths)} commas")


def differences(whole: Path, killed: Path) -> Iterator[str]:
    """What is not bit for bit the same in two runs' folders."""
    files = [{p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()} for f in (whole, killed)]
    if files[0] != files[1]:
        yield f"files: {sorted(files[0] ^ files[1])}"
    ours, theirs = (load_file(folder / "backbone.safetensors") for folder in (whole, killed))
    if not same(ours, theirs):
        yield "backbone.safetensors"
    for name in ("last", "best"):
        ours, theirs = (read_checkpoint(folder / "checkpoints" / f"{name}.ckpt") for folder in (whole, killed))
        parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "means")
        yield from (f"{name}.ckpt: {part}" for part in parts if not same(ours[part], theirs[part]))
        if not same(ours.get("averaging_state"), theirs.get("averaging_state")):
            yield f"{name}.ckpt: averaging_state"
    if figures(whole) != figures(killed):
        yield "metrics.csv"
    ours, theirs = (json.loads((folder / SUMMARY).read_text()) for folder in (whole, killed))
    yield from (f"{SUMMARY}: {key}" for key in ours if key not in OWN_TO_A_PROCESS and ours[key] != theirs.get(key))


def figures(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv as text, without what is measured by a clock."""
    return [{k: v for k, v in row.items() if k not in TIMED_COLUMNS} for row in read_rows(folder / "metrics.csv")]


def same(ours: Any, theirs: Any) -> bool:
    """Whether nested values are equal, tensors bit for bit."""
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    return bool(ours == theirs)


def line_of(outcome: Outcome) -> str:
    """A row of the table."""
    rows = ", ".join(str(kill.rows) for kill in outcome.kills)
    writing = sum(bool(kill.unfinished_files) for kill in outcome.kills)
    unreadable_files = sum(len(kill.unreadable) for kill in outcome.kills)
    end = "identical" if not outcome.different else f"DIFFERENT: {'; '.join(outcome.different)}"
    return f"| {outcome.case} | {len(outcome.kills)} | {rows} | {writing} | {unreadable_files} | {end} |"


def write_results(outcomes: list[Outcome], seed: int) -> None:
    """The table and everything behind it."""
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

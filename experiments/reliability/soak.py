"""2,000 batches with every callback on: memory and open files must not grow.

    python experiments/reliability/soak.py <folder> [batches=2000] [seed=0]

A run on the digits: 40 batches per epoch, each epoch with validation; checkpoints every epoch and every 10 batches;
averaged weights, early stopping that never triggers, a progress bar (its output goes to <folder>/output.txt), best
checkpoint, peak memory, metrics.csv with a row per batch, W&B offline with pictures of reconstructions every 4 epochs.

Readings are taken from the kernel at the end of every 20th batch, before anything of that batch is written: resident
memory (/proc/self/smaps_rollup: Rss, and its anonymous part, which excludes mapped files), open descriptors
(/proc/self/fd), threads. No garbage is collected for a reading. As a single reading depends on what happens to be
alive, the beginning is the median of five readings from batch 200 on, and the end that of the last five. The memory of
W&B's service, a separate process, is read too. Writes soak.json and soak.md into experiments/reliability/results. Exits
with 1 if memory differs by 1 % or more, or if descriptors differ.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from localfeat.run import train as training
from localfeat.run.command import run
from localfeat.run.command_line import parse_arguments
from localfeat.run.composition import composed
from localfeat.run.summary import environment
from localfeat.utils.files import write_whole

RESULTS = Path(__file__).parent / "results"
EVERY, WARM_UP, READINGS = 20, 200, 5
EPOCH = 40  # batches
LIMIT = 0.01  # share of the resident memory
OVERRIDES = [
    "method=feature_recon",
    "split=k4",
    "backbone=swin_micro",
    "backbone.arguments.embed_dim=8",
    "backbone.arguments.depths=[1,1,1,1]",
    "backbone.arguments.num_heads=[1,1,2,2]",
    "trainer=cpu",
    "batch_size=16",
    f"trainer.limit_train_batches={EPOCH}",
    "trainer.limit_val_batches=4",
    "trainer.limit_test_batches=4",
    "trainer.log_every_n_steps=1",
    "callbacks=ema",
    "callbacks.early_stopping=100000",
    "callbacks.checkpoint_every_n_batches=10",
    "logger=wandb",
    "logger.mode=offline",
    "logger.reconstructions_every_n_epochs=4",
]


@dataclass
class Reading:
    """The process's resources after ``batch`` batches; memory in KiB."""

    batch: int
    resident: int
    anonymous: int
    descriptors: int
    threads: int
    objects: int
    service: int


class Watch(Callback):
    """Callback that takes a reading at the end of every ``EVERY``-th batch."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step % EVERY == 0:
            self.readings.append(reading(trainer.global_step))


def reading(batch: int) -> Reading:
    """Take a reading of this process."""
    return Reading(
        batch=batch,
        resident=memory("self", "Rss"),
        anonymous=memory("self", "Anonymous"),
        descriptors=len(os.listdir("/proc/self/fd")) - 1,  # without the one that lists them
        threads=len(os.listdir("/proc/self/task")),
        objects=len(gc.get_objects()),
        service=sum(memory(process, "Rss") for process in services()),
    )


def memory(process: str, kind: str) -> int:
    """Return a line of the kernel's record of a process, in KiB."""
    lines = Path("/proc", process, "smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def services() -> Iterator[str]:
    """Yield W&B's services among the children of this process."""
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            if Path("/proc", child, "comm").read_text().startswith("wandb-core"):
                yield child


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Build every run with ``watch`` before its other callbacks."""
    build: Callable[..., list[Callback]] = training.build_callbacks
    training.build_callbacks = lambda *given, **named: [watch, *build(*given, **named)]
    try:
        yield
    finally:
        training.build_callbacks = build


def soak(folder: Path, batches: int, seed: int) -> list[Reading]:
    """Train ``batches`` batches in ``folder``."""
    folder.mkdir(parents=True)
    os.environ["FORCE_COLOR"] = "1"  # rich then draws its bar into a file, too
    os.environ["WANDB_MODE"] = "offline"
    torch.set_num_threads(1)
    config = composed([*OVERRIDES, f"epochs={-(-batches // EPOCH)}", f"seed={seed}"])
    watch = Watch()
    with (folder / "output.txt").open("w") as output, redirect_stdout(output), watched(watch):
        run(config, folder / "run")
    return watch.readings


def compared(readings: list[Reading]) -> dict[str, tuple[float, float]]:
    """Map each figure to its medians at the beginning and at the end."""
    begin, end = [r for r in readings if r.batch >= WARM_UP][:READINGS], readings[-READINGS:]
    if begin[-1].batch >= end[0].batch:
        raise ValueError(f"{readings[-1].batch} batches are too few: the beginning reaches to {begin[-1].batch}")
    names = [name for name in asdict(readings[0]) if name != "batch"]
    return {name: (median(getattr(r, name) for r in begin), median(getattr(r, name) for r in end)) for name in names}


def holds(found: dict[str, tuple[float, float]]) -> bool:
    """Return whether neither memory nor descriptors have changed beyond the limit."""
    before, after = found["resident"]
    return abs(after - before) < LIMIT * before and found["descriptors"][0] == found["descriptors"][1]


def table(readings: list[Reading]) -> str:
    """Format the comparison, and a line of readings for every tenth of the run."""
    found = compared(readings)
    lines = ["| | from batch 200 | at the end | change |", "|---|---|---|---|"]
    for name, (before, after) in found.items():
        unit = 1024 if name in ("resident", "anonymous", "service") else 1
        label = f"{name}, MiB" if unit > 1 else name
        change = f"{100 * (after - before) / before:+.2f} %" if before else "–"
        lines.append(f"| {label} | {before / unit:,.{1 if unit > 1 else 0}f} | {after / unit:,.1f} | {change} |")
    lines += ["", "| batch | resident, MiB | descriptors | threads |", "|---|---|---|---|"]
    shown = readings[:: max(1, len(readings) // 10)]
    lines += [f"| {r.batch} | {r.resident / 1024:,.1f} | {r.descriptors} | {r.threads} |" for r in shown]
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    given = [f"folder={a}" if "=" not in a and not a.startswith("-") else a for a in sys.argv[1:]]
    values = parse_arguments(__doc__ or "", {"folder": ..., "batches": "2000", "seed": "0"}, given)
    readings = soak(Path(values["folder"]), int(values["batches"]), int(values["seed"]))
    versions = environment()["versions"]
    text = table(readings)
    head = (
        f"# {readings[-1].batch} batches with every callback on\n\nWritten by `python experiments/reliability/soak.py`"
    )
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "lightning") if name in versions)
    RESULTS.mkdir(exist_ok=True)
    write_whole(RESULTS / "soak.md", f"{head}: see there how it is measured. {used}.\n\n{text}\n".encode())
    content = {"overrides": OVERRIDES, "versions": versions, "readings": [asdict(reading) for reading in readings]}
    write_whole(RESULTS / "soak.json", (json.dumps(content, indent=1) + "\n").encode())
    print(text)
    sys.exit(not holds(compared(readings)))


if __name__ == "__main__":
    main()

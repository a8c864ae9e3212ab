"""Run commands in forks of a process that has imported everything, and compare the folders of two runs."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from localfeat.run.checkpoints.files import read_checkpoint
from localfeat.run.command import main as run_main
from localfeat.run.folder import RunFolder
from localfeat.run.loggers.metrics_csv import read_rows

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
TIMED_COLUMNS = {"speed/images_per_second", "speed/outside_step"}
OWN_TO_A_PROCESS = {"seconds", "images_per_second", "commit", "command", "overrides"}
"""Figures that differ between any two runs: wall time, the command as typed and its folder."""


def start(
    arguments: list[str],
    log: Path,
    *,
    errors: Path | None = None,
    prepare: Callable[[], object] = lambda: None,
    entry: Callable[[], None] = run_main,
) -> int:
    """Run ``python -m localfeat.run <arguments>`` in a fork of this process; return the child's process id.

    Args:
        arguments: the command-line arguments.
        log: file to which stdout is appended, and stderr unless ``errors`` is given.
        errors: file to which stderr is appended.
        prepare: function called in the fork before anything else.
        entry: entry function of the command line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    code: Any = 99
    try:
        for number, file in ((1, log), (2, errors or log)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
        sys.stdout = os.fdopen(1, "w", closefd=False)  # a test may have replaced it
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        torch.set_num_threads(1)
        sys.argv = ["localfeat.run", *arguments]
        prepare()
        entry()
        code = 0
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_of(child: int) -> int:
    """Wait for the child; return its exit code, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def rows_of(file: Path) -> int:
    """Return the number of lines below the first."""
    return max(0, file.read_bytes().count(b"\n") - 1) if file.exists() else 0


def unreadable(folder: Path) -> Iterator[str]:
    """Yield every file of a run's folder that exists but cannot be read."""
    readers = {
        "config.yaml": lambda file: RunFolder(file.parent).read_config(),
        "summary.json": lambda file: json.loads(file.read_text()),
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


def differences(whole: Path, killed: Path, *, but: str = "nothing") -> Iterator[str]:
    """Yield every bit-level difference between two runs' folders; ignore files below the folder ``but``."""
    ours, theirs = (set(_files(folder, but)) for folder in (whole, killed))
    if ours != theirs:
        yield f"files: {sorted(ours ^ theirs)}"
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
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (whole, killed))
    yield from (f"summary.json: {key}" for key in ours if key not in OWN_TO_A_PROCESS and ours[key] != theirs.get(key))


def _files(folder: Path, but: str) -> Iterator[str]:
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return (name.as_posix() for name in names if name.parts[0] != but)


def figures(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv as text, without clock readings."""
    return [{k: v for k, v in row.items() if k not in TIMED_COLUMNS} for row in read_rows(folder / "metrics.csv")]


def same(ours: Any, theirs: Any) -> bool:
    """Return whether nested values are equal, tensors bit for bit."""
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    return bool(ours == theirs)

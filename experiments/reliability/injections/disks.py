"""Disks are full or read-only, folders vanish."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from experiments.reliability.injections.calls import SHORT
from experiments.reliability.injections.trial import At, NotPossibleError, Trial, need, one_line, watch
from localfeat.run import figures
from localfeat.run import train as training

LARGE = 1 << 16  # KiB
FULL = "No space left on device"
SIZES = (8, 16, 20, 28, 36, 200, 1700, 3100, 3300, 4700, 4900, 6200, 6600)  # KiB


@contextmanager
def disk(folder: Path, kib: int) -> Iterator[Path]:
    """Mount a file system in memory on ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "faults", str(folder)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotPossibleError(f"mount: {error.strerror}") from error
    if mounted.returncode:
        raise NotPossibleError(f"no disk can be mounted here ({mounted.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change the mount options of a disk."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Shrink a disk to its contents."""
    found = os.statvfs(folder)
    remount(folder, f"size={max(1, found.f_blocks - found.f_bfree) * found.f_frsize // 1024}k")


def full_at(moment: Callable[[Path], object], file: str) -> Callable[[Path], str]:
    """Return a fault in which the disk fills up at ``moment``, so that ``file`` cannot be written."""

    def make(place: Path) -> str:
        trial = Trial(place)
        with disk(trial.folder, LARGE):
            one_line(trial.run(prepare=lambda: moment(trial.folder)), 1, FULL, f"{trial.folder / file} cannot be")
            remount(trial.folder, f"size={LARGE}k")
            trial.resume()
        return f"one line names {Path(file).name}, exit code 1; identical"

    return make


def at(epoch: int, batches: int) -> Callable[[Path], object]:
    """Return the moment after ``batches`` batches of an epoch."""
    return lambda folder: watch(At("on_train_batch_start", partial(fill, folder), epoch, batches))


def before(name: str) -> Callable[[Path], object]:
    """Return the moment before a function of localfeat.run.train is called; pictures are drawn."""

    def moment(folder: Path) -> None:
        training.learning_curves = figures.learning_curves
        function = getattr(training, name)

        def late(*arguments: Any, **named: Any) -> Any:
            fill(folder)
            return function(*arguments, **named)

        setattr(training, name, late)

    return moment


def sizes(place: Path) -> str:
    """Use disks of many sizes, each full at some point."""
    where: Counter[str] = Counter()
    for kib in SIZES:
        trial = Trial(place / str(kib), base=SHORT)
        with disk(trial.folder, kib):
            ended = trial.run()
            if ended.code:
                line = one_line(ended, ended.code, FULL)
                need(ended.code in (1, 2), f"{kib} KiB: exit code {ended.code}")
                where[next((n for n in NAMES if f"{n} cannot be" in line), "the folder itself")] += 1
            else:
                where["nothing"] += 1
            remount(trial.folder, f"size={LARGE}k")
            if ended.code:
                trial.resume()
            trial.identical()
    return f"{len(SIZES)} sizes, full at {', '.join(f'{name} ({n})' for name, n in where.items())}; identical"


NAMES = ("config.yaml", "metrics.csv", "last.ckpt", "best.ckpt", "safetensors", ".png", "summary.json", "hydra.yaml")


def read_only_at_the_start(place: Path) -> str:
    """Start on a read-only disk."""
    trial = Trial(place)
    with disk(trial.folder, LARGE):
        remount(trial.folder, "ro")
        one_line(trial.run(), 2, "Read-only file system", str(trial.folder))
        remount(trial.folder, "rw")
        trial.resume()
    return "one line, exit code 2; identical"


def no_more_privileges() -> None:
    """Let file permissions apply to this process even if it is root's (drop CAP_DAC_OVERRIDE)."""
    if os.geteuid() != 0:
        return
    library = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if library.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    data[0] &= ~(1 << 1)
    data[1] &= ~(1 << 1)
    if library.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def read_only_during_the_run(place: Path) -> str:
    """Remove write permission during the run, which obeys even as root."""
    trial = Trial(place)
    folders = (trial.folder / "checkpoints", trial.folder)

    def prepare() -> None:
        no_more_privileges()
        watch(At("on_train_batch_start", lambda: [os.chmod(folder, 0o555) for folder in folders], 1, 2))

    ended = trial.run(prepare=prepare)
    for folder in folders:
        os.chmod(folder, 0o755)
    one_line(ended, 1, "last.ckpt cannot be written (Permission denied)")
    trial.resume()
    return "one line names last.ckpt, exit code 1; identical"


def folder_deleted(place: Path) -> str:
    """Delete the run's folder: everything is lost, and the same command starts anew."""
    trial = Trial(place)
    ended = trial.run(prepare=lambda: watch(At("on_train_batch_start", lambda: shutil.rmtree(trial.folder), 1, 2)))
    one_line(ended, 1, str(trial.folder))
    need(not trial.folder.exists(), "it has made the folder again")
    trial.resume()
    return "one line, exit code 1; begins anew and is identical"


def folder_renamed(place: Path) -> str:
    """Rename the run's folder."""
    trial, other = Trial(place), place / "other"
    ended = trial.run(prepare=lambda: watch(At("on_train_batch_start", lambda: trial.folder.rename(other), 1, 2)))
    one_line(ended, 1, str(trial.folder))
    need(not trial.folder.exists(), "it has made the folder again")
    other.rename(trial.folder)
    trial.resume()
    return "one line, exit code 1; back under its name it goes on identical"


def file_for_a_folder(place: Path) -> str:
    """Put a file where the folder should be."""
    trial = Trial(place)
    for blocked in (trial.folder, trial.folder.parent / "output"):
        trial.folder = blocked if blocked.name == "run" else blocked / "run"
        blocked.write_text("mine")
        one_line(trial.run(), 2, str(blocked))
        need(blocked.read_text() == "mine", "the file has changed")
        blocked.unlink()
        trial.resume()
    return "one line, exit code 2, the file stays; without it identical"


LINE = "one line, exit code 1; with room identical"
FAULTS = [
    ("disk full at the first row of metrics.csv", LINE, full_at(at(0, 0), "metrics.csv")),
    ("disk full at the first checkpoint", LINE, full_at(at(0, 2), "checkpoints/last.ckpt")),
    ("disk full at a later checkpoint", LINE, full_at(at(1, 2), "checkpoints/last.ckpt")),
    ("disk full at the exported backbone", LINE, full_at(before("export_backbone"), "backbone.safetensors")),
    ("disk full at the pictures", LINE, full_at(before("learning_curves"), "learning_curves.png")),
    ("disk full at the summary", LINE, full_at(before("write_summary"), "summary.json")),
    ("disks of 8 KiB to 6 MiB", LINE, sizes),
    ("read-only disk at the start", "one line, exit code 2; then identical", read_only_at_the_start),
    ("folder without write permission from a batch on", LINE.replace("room", "it"), read_only_during_the_run),
    ("the run's folder is deleted in training", "one line, exit code 1; begins anew", folder_deleted),
    ("the run's folder is renamed in training", "one line, exit code 1; back again identical", folder_renamed),
    ("a file where the folder goes", "one line, exit code 2; then identical", file_for_a_folder),
]

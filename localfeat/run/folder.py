"""What lies where in a run's folder."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = "checkpoints"
BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
CONFIG, SUMMARY = "config.yaml", "summary.json"


def has_ended(folder: Path) -> bool:
    """Whether the run in ``folder`` is complete: its summary is the last thing that it writes."""
    return (folder / SUMMARY).is_file()


def left_to_go_on(folder: Path) -> list[Path]:
    """The checkpoints that a run in ``folder`` may go on from, the newest first; sound or not."""
    files = [folder / CHECKPOINTS / name for name in (LAST, PREVIOUS)]
    return [file for file in files if file.is_file()]

"""A run's terminal output: a progress bar (plain lines in a log file) and a table at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table

from localfeat.run.callbacks.peak_memory import GIB
from localfeat.run.callbacks.throughput import Throughput
from localfeat.run.output import silence
from localfeat.run.summary import RunSummary

SECONDS_BETWEEN_READINGS = 0.5


class PatientConsole(Console):
    """A console that falls silent once its reader has gone (``| head``); rich's own would end the training."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence()


class RunProgress(RichProgressBar):
    """A line per epoch with loss, validation accuracy and images per second; below it on a terminal, a bar.

    Where standard output is not a terminal (a file, a pipe, a batch system), there are no control characters.

    Args:
        console: the console to write to; None for one on standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._plain = console or PatientConsole()
        self._read_at = 0.0
        self._texts: dict[str, Any] = {}

    @property
    def is_enabled(self) -> bool:
        """Whether a bar is shown; plain lines do not count."""
        return bool(super().is_enabled) and self._plain.is_terminal

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        """Return the loss so far as text for the bar; more would not fit into 80 columns."""
        now = time.monotonic()
        if now - self._read_at >= SECONDS_BETWEEN_READINGS or trainer.is_last_batch:  # reading waits for the device
            self._read_at = now
            self._texts = {name: text for name, text in epoch_figures(trainer).items() if name == "loss" and text}
        return self._texts

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if self.progress is not None and self.train_progress_bar_id is not None:  # Lightning counts epochs from 0
            self.progress.update(self.train_progress_bar_id, description=epoch_number(trainer))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if super().is_enabled:
            console = self._plain if self.progress is None else self.progress.console  # above the bar
            console.print(epoch_line(trainer), highlight=False, soft_wrap=True)


def epoch_figures(trainer: lightning.Trainer) -> dict[str, str]:
    """Return loss, validation accuracy and speed as text, empty if not known."""
    metrics = trainer.callback_metrics
    loss, accuracy = metrics.get("train/loss"), metrics.get("val/accuracy")
    speeds = [callback.latest for callback in getattr(trainer, "callbacks", []) if isinstance(callback, Throughput)]
    speed = speeds[0] if speeds else None
    return {
        "loss": "" if loss is None else f"{float(loss):.4f}",
        "val accuracy": "" if accuracy is None else percent(float(accuracy)),
        "images/s": "" if speed is None else f"{speed:,.0f}",
    }


def epoch_number(trainer: lightning.Trainer) -> str:
    """Return the current epoch, from 1, and the number of epochs."""
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else "?"
    return f"epoch {trainer.current_epoch + 1}/{epochs}"


def epoch_line(trainer: lightning.Trainer) -> str:
    """Return one line for the current epoch."""
    figures = [f"{name} {text}" for name, text in epoch_figures(trainer).items() if text]
    return "  ".join([epoch_number(trainer), *figures])


def final_table(summary: RunSummary, folder: str | Path, console: Console | None = None, *, scored: str = "") -> None:
    """Print the run's main figures and its folder, leaving out figures that were not measured.

    Args:
        summary: the figures.
        folder: the run's folder.
        console: where to print; ``None`` for standard output.
        scored: the part of the test set that was scored; empty for all of it.
    """
    console = console or PatientConsole()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim" if console.is_terminal else None)
    table.add_column(overflow="fold")
    lines = summary_lines(summary, scored)
    for label, text in lines:
        table.add_row(label, text)
    console.print(table, highlight=False, markup=False)
    # Printed outside the table, which would wrap a long path so that it cannot be copied.
    label = "folder".ljust(max(len(label) for label, _ in [*lines, ("folder", "")]) + 2)
    console.print(f"{label}{folder}", highlight=False, markup=False, soft_wrap=True)


def summary_lines(summary: RunSummary, scored: str = "") -> list[tuple[str, str]]:
    """Return (label, text) of every figure that was measured. GiB are 1024³ bytes."""
    parts, part = summary.parameters, f" ({scored})" if scored else ""
    lines = [
        ("test accuracy", None if summary.test_accuracy is None else percent(summary.test_accuracy) + part),
        ("val accuracy", None if summary.val_accuracy is None else percent(summary.val_accuracy)),
        ("images/s", None if summary.images_per_second is None else f"{summary.images_per_second:,.0f}"),
        ("peak memory", None if summary.peak_memory_bytes is None else memory_text(summary)),
        ("parameters", parameter_text(parts) if parts else None),
    ]
    return [(label, text) for label, text in lines if text is not None]


def memory_text(summary: RunSummary) -> str:
    """Return the peak, the module with the highest peak if there are several, and the figures' source.

    The text fits into 80 columns.
    """
    peaks = summary.module_peak_memory_bytes
    heaviest = f", {max(peaks, key=lambda name: peaks[name])}" if len(peaks) > 1 else ""
    return f"{(summary.peak_memory_bytes or 0) / GIB:.3f} GiB{heaviest} ({summary.peak_memory_source})"


def parameter_text(parts: dict[str, int]) -> str:
    """Return the total number of parameters, and those of backbone and auxiliary parts."""
    named = ", ".join(f"{name} {count:,}" for name, count in parts.items() if name in ("backbone", "auxiliary"))
    total = parts.get("total")
    return named if total is None else f"{total:,}" + (f" ({named})" if named else "")


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"

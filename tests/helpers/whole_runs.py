"""Whole runs for tests: composed configurations, small networks, killed runs, and readers of a run's files."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor

from localfeat.run import composition
from localfeat.run import train as training
from localfeat.run.command import run
from localfeat.run.composition import plain
from localfeat.run.configuration import RunConfiguration
from localfeat.run.loggers.metrics_csv import read_rows

BATCHES = 4  # per epoch
TINY_SWIN = [
    "backbone=swin_micro",
    "backbone.arguments.embed_dim=8",
    "backbone.arguments.depths=[1,1,1,1]",
    "backbone.arguments.num_heads=[1,1,2,2]",
]
SMALL = [
    *TINY_SWIN,
    "trainer=cpu",
    "batch_size=16",
    "epochs=3",
    "callbacks.progress_bar=false",
    f"trainer.limit_train_batches={BATCHES}",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.log_every_n_steps=1",
]
"""Three epochs of the digits, one second in all. Later overrides of the same key win."""

TIMED = ("speed/images_per_second", "speed/outside_step")  # columns of metrics.csv that differ between runs


def composed(*overrides: str) -> DictConfig:
    """Return the configuration of ``python -m localfeat.run <overrides>``."""
    return composition.composed(overrides)


def configured(*overrides: str) -> RunConfiguration:
    """Return the same as a typed object."""
    return RunConfiguration.from_values(plain(composed(*overrides)))


def small_run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Train a small run in ``folder``; return the content of its summary.json."""
    return run(composed(*SMALL, *overrides), folder)


def made_once(
    factory: pytest.TempPathFactory, variants: Mapping[str, list[str]]
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Return a function for folder and summary of a variant's uninterrupted run, which is made on first use."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(variant: str) -> tuple[Path, dict[str, Any]]:
        if variant not in made:
            folder = factory.mktemp("whole") / "run"
            with pytest.MonkeyPatch.context() as patch:
                draw_nothing(patch)
                made[variant] = folder, small_run(folder, *variants[variant])
        return made[variant]

    return get


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Leave the two pictures empty, because drawing them takes most of a small run's time."""
    for name in ("learning_curves", "reconstruction_grid"):
        patch.setattr(training, name, lambda *arguments, **_: arguments[-1].write_bytes(b""))


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def metrics(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv as text, without the timed columns."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in read_rows(folder / "metrics.csv")]


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return found


def exported(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of backbone.safetensors; its bytes differ between runs by the order of its metadata."""
    return load_file(folder / "backbone.safetensors")


class KillAt(Callback):
    """Kills its own process when ``hook`` is called for batch ``batch`` of epoch ``epoch`` (both from 0)."""

    def __init__(self, hook: str, epoch: int, batch: int) -> None:
        def kill(trainer: lightning.Trainer, *_: Any) -> None:
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            if not trainer.sanity_checking and trainer.current_epoch == epoch and done >= batch:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(self, hook, kill)


def _run_to_death(folder: Path, overrides: list[str], hook: str, epoch: int, batch: int) -> None:
    torch.set_num_threads(1)
    build = training.build_callbacks
    training.build_callbacks = lambda *a, **k: [KillAt(hook, epoch, batch), *build(*a, **k)]
    run(composed(*overrides), folder)


def killed_run(folder: Path, *overrides: str, hook: str, epoch: int, batch: int = 0, resume: bool = False) -> None:
    """Train a small run in its own process and kill it at ``hook``; epoch and batch count from 0.

    The processes are forked from a server that has imported everything and computed nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.whole_runs"])
    chosen = [f"resume={folder}"] if resume else [*SMALL, *overrides]
    process = context.Process(target=_run_to_death, args=(folder, chosen, hook, epoch, batch))
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "summary.json").exists()


def lose_reader(descriptor: int) -> None:
    """Make standard output (1) or error (2) of this process a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, descriptor)
    if descriptor == 1:
        sys.stdout = os.fdopen(1, "w")


def child_exit(action: Callable[[], object]) -> int:
    """Run ``action`` in a fork of this process; return the exit code, or minus the number of the signal."""
    child = os.fork()
    if child == 0:
        code: Any = 99
        try:
            torch.set_num_threads(1)
            action()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class At(Callback):
    """Calls ``action()`` once, when ``hook`` is called in epoch ``epoch`` after ``batches`` batches."""

    def __init__(self, hook: str, action: Callable[[], object], epoch: int = 0, batches: int = 0) -> None:
        self.done = False

        def act(trainer: lightning.Trainer, *_: Any) -> None:
            ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            if not self.done and trainer.current_epoch == epoch and ready >= batches:
                self.done = True
                action()

        setattr(self, hook, act)


def watched_by(patch: pytest.MonkeyPatch, *callbacks: Callback) -> None:
    """Add these callbacks to every run, before its own."""
    build = training.build_callbacks
    patch.setattr(training, "build_callbacks", lambda *a, **k: [*callbacks, *build(*a, **k)])

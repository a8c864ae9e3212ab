"""What is used of Lightning beside its public names still is what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loggers import Logger

from localfeat.learner.lightning_internals import averaged_model, count_batch, log_now, resume_by_epochs
from tests.helpers.small import learner, loader, trainer


def test_count_batch_moves_the_global_step() -> None:
    run = trainer()
    run.fit(learner("greedy_ce", 2), loader(3))
    assert run.global_step == 3
    count_batch(run)
    assert run.global_step == 4


class ByEpochs(Callback):
    """Resumes by epochs, if it is told to, and keeps which epochs and batches there were."""

    def __init__(self, told: bool) -> None:
        self.told = told
        self.seen: list[tuple[int, int]] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.told:
            resume_by_epochs(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((trainer.current_epoch, batch_idx))


class SaveAtEpochEnd(Callback):
    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.file)


def test_resume_by_epochs_begins_with_the_next_epoch(tmp_path: Path) -> None:
    """Without it Lightning leaves that epoch out: if this no longer holds, the function is not needed."""
    file = tmp_path / "end.ckpt"
    trainer(SaveAtEpochEnd(file), max_steps=6).fit(learner("greedy_ce", 2), loader(2))
    seen = {}
    for told in (True, False):
        epochs = ByEpochs(told)
        run = trainer(epochs, max_steps=6)
        run.fit(learner("greedy_ce", 2), loader(2), ckpt_path=file)
        seen[told] = epochs.seen
    assert seen[True] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert seen[False] != seen[True]


class Rows(Logger):
    """Keeps what it is given."""

    name, version = "rows", 0

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any) -> None:
        """Nothing to keep."""


class LogNow(Callback):
    """Has every figure logged twice, and keeps how many rows there were after the first time."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.lengths: list[int] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        log_now(trainer)
        self.lengths.append(len(self.rows.rows))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("speed", 1.0)
        log_now(trainer)


def test_log_now_gives_loggers_the_rows_that_lightning_gives_them_next() -> None:
    rows = Rows()
    callback = LogNow(rows)
    run = trainer(callback, logger=rows)
    run.fit(learner("greedy_ce", 2), loader(2))
    assert callback.lengths == [1, 3], "at once"
    assert len(rows.rows) == 6 and rows.rows[::2] == rows.rows[1::2]
    assert [step for step, _ in rows.rows[::2]] == [0, 1, 1]
    assert "train/loss" in rows.rows[0][1] and rows.rows[4][1]["speed"] == 1


def test_averaged_model_is_the_copy_that_lightning_keeps() -> None:
    average, model = WeightAveraging(), learner("greedy_ce", 2)
    assert averaged_model(average) is None and averaged_model(Callback()) is None
    trainer(average).fit(model, loader(1))
    copy = averaged_model(average)
    assert isinstance(copy, torch.optim.swa_utils.AveragedModel)
    assert {tuple(p.shape) for p in copy.parameters()} == {tuple(p.shape) for p in model.parameters()}

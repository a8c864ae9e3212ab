"""Reproducible batches, and the speed measurement."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from localfeat.run.callbacks.peak_memory import PeakMemory
from localfeat.run.callbacks.seeding import SeedEachBatch, batch_seed
from localfeat.run.callbacks.throughput import Throughput
from localfeat.run.checkpoints.callbacks import AveragedWeights
from tests.helpers.tiny import BATCH_SIZE, TinyLearner, fit, loader, trainer


def test_batch_seeds_differ_in_every_argument() -> None:
    seeds = {batch_seed(*key) for key in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert batch_seed(3, 1, 4, 0) == batch_seed(3, 1, 4, 0)


def test_validation_does_not_disturb_the_randomness_of_training(tmp_path: Path) -> None:
    drawn = []
    for val in (0, 3):
        learner = TinyLearner()
        fit(tmp_path, learner, [SeedEachBatch(7)], train=4, val=val, max_epochs=2, val_check_interval=2)
        drawn.append(learner.seen)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 8, "no two batches share a seed"


def test_a_resumed_run_draws_what_the_whole_run_draws(tmp_path: Path) -> None:
    whole, resumed = TinyLearner(), TinyLearner()
    checkpoint = ModelCheckpoint(tmp_path, filename="at_6", every_n_train_steps=6)
    fit(tmp_path, whole, [SeedEachBatch(7), checkpoint], max_epochs=2, enable_checkpointing=True)
    torch.manual_seed(123)
    run = trainer(tmp_path, callbacks=[SeedEachBatch(7)], max_epochs=2)
    run.fit(resumed, loader(4), ckpt_path=tmp_path / "at_6.ckpt")
    assert len(whole.seen) == 8
    assert resumed.seen == whole.seen[6:]


def test_weights_are_the_same_with_and_without_measuring(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [PeakMemory(), Throughput()]):
        torch.manual_seed(0)
        learner = TinyLearner()
        fit(tmp_path, learner, [SeedEachBatch(0), *callbacks], train=5)
        weights.append(torch.cat([p.detach().flatten() for p in learner.parameters()]))
    assert torch.equal(*weights)


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 0.0

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("localfeat.run.callbacks.throughput.time.perf_counter", lambda: clock.now)
    return clock


def test_throughput_leaves_out_warm_up_and_the_measured_batch(tmp_path: Path, clock: Clock) -> None:
    durations = [100.0, 50.0, 70.0, 2.0, 2.0, 4.0]  # compilation, autotuning, accounting, then training
    learner = TinyLearner(lambda batch_idx: clock.wait(durations[batch_idx]))
    speed = Throughput()
    fit(tmp_path, learner, [PeakMemory(), speed], train=6)
    assert speed.images_per_second == pytest.approx(3 * BATCH_SIZE / 8.0)
    assert speed.seconds_outside_step == 0.0


def test_without_peak_memory_the_third_batch_counts(tmp_path: Path, clock: Clock) -> None:
    durations = [100.0, 50.0, 2.0, 2.0]
    speed = Throughput()
    fit(tmp_path, TinyLearner(lambda batch_idx: clock.wait(durations[batch_idx])), [speed], train=4)
    assert speed.images_per_second == pytest.approx(2 * BATCH_SIZE / 4.0)


class SlowValidation(TinyLearner):
    def __init__(self, clock: Clock) -> None:
        super().__init__(lambda batch_idx: clock.wait(1.0))
        self.clock = clock

    def validation_step(self, batch, batch_idx) -> None:
        self.clock.wait(1000.0)


def test_validation_is_not_timed(tmp_path: Path, clock: Clock) -> None:
    speed = Throughput()
    fit(tmp_path, SlowValidation(clock), [speed], train=4, val=2, max_epochs=3, val_check_interval=2)
    assert speed.epochs == [pytest.approx(BATCH_SIZE)] * 3


class SlowLoader:
    def __init__(self, clock: Clock, batches: int) -> None:
        self.batches, self.clock = list(loader(batches)), clock

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            self.clock.wait(3.0)
            yield batch


def test_waiting_for_the_loader_counts_and_is_told(tmp_path: Path, clock: Clock) -> None:
    speed = Throughput()
    learner = TinyLearner(lambda batch_idx: clock.wait(1.0))
    # Lightning fetches one batch ahead to detect the last one: of 10 batches, 7 waits fall into the 8 timed ones.
    trainer(tmp_path, callbacks=[speed], max_epochs=1).fit(learner, SlowLoader(clock, 10))
    seconds = 8 * 1.0 + 8 * 3.0
    assert speed.images_per_second == pytest.approx(8 * BATCH_SIZE / seconds, rel=0.15)
    assert speed.seconds_outside_step == pytest.approx(0.75, abs=0.03)


def test_median_over_epochs(tmp_path: Path, clock: Clock) -> None:
    per_epoch = iter([1.0] * 4 + [8.0] * 4 + [2.0] * 4)
    speed = Throughput()
    fit(tmp_path, TinyLearner(lambda _: clock.wait(next(per_epoch))), [speed], train=4, max_epochs=3)
    assert speed.epochs == [pytest.approx(BATCH_SIZE / s) for s in (1.0, 8.0, 2.0)]
    assert speed.images_per_second == pytest.approx(BATCH_SIZE / 2.0)


def test_a_run_too_short_to_time_has_no_figure(tmp_path: Path) -> None:
    speed = Throughput()
    run = trainer(tmp_path, callbacks=[PeakMemory(), speed], max_epochs=1)
    run.fit(TinyLearner(), loader(3))
    assert speed.images_per_second is None and speed.seconds_outside_step is None and speed.latest is None
    assert "speed/images_per_second" not in run.callback_metrics


def test_real_time(tmp_path: Path) -> None:
    speed = Throughput()
    fit(tmp_path, TinyLearner(lambda _: time.sleep(0.02)), [speed], train=6)
    assert speed.images_per_second is not None
    assert 0.2 * BATCH_SIZE / 0.02 < speed.images_per_second < BATCH_SIZE / 0.02


def test_an_average_leaves_whole_numbers_alone() -> None:
    """Table indices, as in Swin's attention, would be truncated: 0.9 * 41 + 0.1 * 41 is less than 41."""
    module, average = lightning.LightningModule(), AveragedWeights(decay=0.9)
    module.register_buffer("positions", torch.arange(100), persistent=False)
    module.register_buffer("mean", torch.zeros(1))
    average.setup(cast(Any, None), module, "fit")
    assert average._average_model is not None
    for _ in range(3):
        average._average_model.update_parameters(module)
        module.get_buffer("mean").fill_(1)
    torch.testing.assert_close(average._average_model.module.get_buffer("positions"), torch.arange(100), rtol=0, atol=0)
    torch.testing.assert_close(average._average_model.module.get_buffer("mean"), torch.tensor([0.19]))

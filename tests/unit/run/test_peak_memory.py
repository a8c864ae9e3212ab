"""Peak memory of a whole run by accounting."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from localfeat.memory.tracker import rounded
from localfeat.run.callbacks.peak_memory import GIB, PeakMemory, averaged_tensors
from localfeat.run.checkpoints.callbacks import AveragedWeights
from tests.helpers.tiny import BATCH_SIZE, MIB, NOISE, TinyLearner, fit, loader, stop_at, trainer


def test_peak_memory_counts_weights_optimizer_state_batch_and_graph(tmp_path: Path) -> None:
    learner, memory = TinyLearner(), PeakMemory()
    fit(tmp_path, learner, [memory], train=5)
    parameters = sum(rounded(p.nbytes) for p in learner.parameters())
    moments = 2 * parameters
    counters = len(list(learner.parameters())) * rounded(4)
    batch = rounded(BATCH_SIZE * 12 * 4) + rounded(BATCH_SIZE * 8)
    fixed = parameters + moments + counters + batch
    assert memory.slow_batch == 2
    assert memory.source == "allocator accounting of one training batch"
    assert memory.reserved_bytes is None
    # On top of persistent memory: at least one module's gradients, at most a few more small tensors.
    assert memory.peak_bytes is not None
    assert fixed + parameters // 2 <= memory.peak_bytes <= fixed + parameters + 40 * 512


@pytest.mark.parametrize(("batches", "expected"), [(1, 0), (2, 1), (3, 2), (9, 2)])
def test_short_runs_measure_their_last_batch(tmp_path: Path, batches: int, expected: int) -> None:
    memory = PeakMemory()
    fit(tmp_path, TinyLearner(), [memory], train=1, max_epochs=batches)
    assert memory.slow_batch == expected
    assert memory.peak_bytes


def test_a_run_that_stops_before_the_measured_batch_has_no_figure(tmp_path: Path) -> None:
    memory = PeakMemory()
    with pytest.raises(KeyError):
        fit(tmp_path, TinyLearner(stop_at(0)), [memory], train=5)
    assert memory.peak_bytes is None and memory.source is None


def test_an_error_in_the_measured_batch_leaves_no_accounting_behind(tmp_path: Path) -> None:
    memory = PeakMemory()
    with pytest.raises(KeyError):
        fit(tmp_path, TinyLearner(stop_at(2)), [memory], train=5)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert memory.peak_bytes is None


def test_peak_memory_is_logged_in_gib(tmp_path: Path) -> None:
    memory = PeakMemory()
    run = trainer(tmp_path, callbacks=[memory], max_epochs=1)
    run.fit(TinyLearner(), loader(4))
    assert memory.peak_bytes is not None
    assert float(run.callback_metrics["memory/peak_gib"]) == pytest.approx(memory.peak_bytes / GIB)


class Plain(lightning.LightningModule):
    """A user's plain model: one optimizer, no local modules."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)
        for name, value in attributes.items():
            setattr(self, name, value)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        torch.empty(2 * MIB, dtype=torch.uint8)
        return nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("attributes", [{}, {"local_modules": ["layer"]}], ids=["none", "something else"])
def test_a_model_without_local_modules_has_an_overall_peak(tmp_path: Path, attributes: Any) -> None:
    memory = PeakMemory()
    run = fit(tmp_path, Plain(**attributes), [memory])
    assert memory.peak_bytes is not None and 2 * MIB < memory.peak_bytes < 2 * MIB + NOISE
    assert memory.module_peak_bytes == {}
    assert [name for name in run.callback_metrics if name.startswith("memory/")] == ["memory/peak_gib"]


def peak_with(folder: Path, *callbacks: Callback) -> tuple[int, TinyLearner]:
    memory, learner = PeakMemory(), TinyLearner()
    fit(folder, learner, [memory, *callbacks])
    assert memory.peak_bytes is not None
    return memory.peak_bytes, learner


def test_a_moving_average_of_the_weights_is_counted(tmp_path: Path) -> None:
    without, learner = peak_with(tmp_path)
    average = AveragedWeights(decay=0.9)
    copies = sum(rounded(p.nbytes) for p in learner.parameters())
    counter = rounded(8)
    assert peak_with(tmp_path, average)[0] == without + copies + counter


def test_an_average_kept_on_another_device_is_not_counted() -> None:
    average = AveragedWeights(decay=0.9)
    run: Any = SimpleNamespace(callbacks=[PeakMemory(), average])
    assert list(averaged_tensors(run, torch.device("cpu"))) == []  # none made yet
    average.setup(run, TinyLearner(), "fit")
    assert len(list(averaged_tensors(run, torch.device("cpu")))) == 5
    assert list(averaged_tensors(run, torch.device("meta"))) == []

"""Peak memory per module, from accounting and from CUDA's statistics, in whole and in resumed runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from localfeat.memory.tracker import StorageTracker
from localfeat.run.callbacks.peak_memory import CUDA_SOURCE, GIB, PeakMemory
from tests.helpers import small
from tests.helpers.tiny import MIB, NOISE, TinyLearner, fit, loader, stop_at, trainer


def hooks(learner: Any) -> list[Any]:
    return [hook for module in learner.local_modules for hook in module._forward_pre_hooks.values()]


class Sampling(StorageTracker):
    """Records the living bytes after every operation, per module at work."""

    def __init__(self, baseline: Any) -> None:
        super().__init__(baseline)
        self.module, self.peaks = "module_1", {}

    def __torch_dispatch__(self, *arguments: Any, **keywords: Any) -> Any:
        result = super().__torch_dispatch__(*arguments, **keywords)
        self.peaks[self.module] = max(self.live_bytes, self.peaks.get(self.module, 0))
        return result


class Witness(Callback):
    """Runs the third batch under ``Sampling``, with its own hooks."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            state = [leaf for o in trainer.optimizers for state in o.state.values() for leaf in state.values()]
            self.tracker = Sampling([*pl_module.parameters(), *pl_module.buffers(), *state, *batch])
            for number, module in enumerate(pl_module.local_modules, start=1):
                module.register_forward_pre_hook(lambda *_, n=number: setattr(self.tracker, "module", f"module_{n}"))
            self.tracker.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.tracker.__exit__(None, None, None)


@pytest.mark.parametrize(("method", "split"), [("feature_recon", 4), ("image_recon", [1, 3]), ("e2e", 4)])
def test_module_peaks_are_those_that_a_tracker_with_other_hooks_finds(method: str, split: Any) -> None:
    memory, witness = PeakMemory(), Witness()
    for callback in (memory, witness):
        model = small.learner(method, split)
        small.trainer(callback).fit(model, small.loader(3))
    assert memory.module_peak_bytes == witness.tracker.peaks
    assert list(memory.module_peak_bytes) == [f"module_{n + 1}" for n in range(len(model.local_modules))]
    assert memory.peak_bytes == max(memory.module_peak_bytes.values())


class Hungry(TinyLearner):
    """Allocates briefly before the first module, in the modules' forward passes, and after the last module."""

    def __init__(self, before: int = 0, forward: tuple[int, int] = (0, 0), after: int = 0) -> None:
        super().__init__(lambda batch_idx: self.eat(after))
        self.before = before
        self.in_validation = 0
        self.at_batch: dict[int, int] = {}
        for module, mib in zip(self.local_modules, forward, strict=True):
            own = module.forward
            module.forward = lambda x, own=own, mib=mib: (self.eat(mib), own(x))[1]

    def eat(self, mib: int) -> None:
        torch.empty(mib * MIB, dtype=torch.uint8, device=self.device)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.eat(self.before + self.at_batch.get(batch_idx, 0))
        super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.eat(self.in_validation)
        super().validation_step(batch, batch_idx)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[StorageTracker]:
    """Emulate CUDA's statistics by accounting; twice as much is reserved as allocated."""
    with StorageTracker() as tracker:
        functions: dict[str, Callable[[Any], Any]] = {
            "max_memory_allocated": lambda device: tracker.peak_bytes,
            "max_memory_reserved": lambda device: 2 * tracker.peak_bytes,
            "reset_peak_memory_stats": lambda device: tracker.reset_peak(),
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr("localfeat.run.callbacks.peak_memory.on_cuda", lambda pl_module: True)
        yield tracker


WINDOWS = [
    ({"forward": (3, 1)}, (3, 1)),
    ({"forward": (1, 3)}, (1, 3)),
    ({"before": 4, "forward": (2, 1)}, (4, 1)),
    ({"before": 1, "forward": (2, 3)}, (2, 3)),
    ({"forward": (2, 1), "after": 4}, (2, 4)),
]
"""The allocations of a step, and the module each belongs to."""


def check_windows(memory: PeakMemory, expected: tuple[int, int], unit: int, tolerance: int) -> None:
    """Check peaks without persistent memory, which is known only for both modules together."""
    first, second = memory.module_peak_bytes["module_1"], memory.module_peak_bytes["module_2"]
    assert first - second == pytest.approx((expected[0] - expected[1]) * unit, abs=tolerance)
    assert min(first, second) >= min(expected) * unit
    assert memory.peak_bytes is not None and memory.peak_bytes >= max(first, second)


@pytest.mark.parametrize(("appetite", "expected"), WINDOWS)
def test_a_window_goes_from_one_forward_pass_to_the_next(tmp_path: Path, appetite: Any, expected: Any) -> None:
    memory, learner = PeakMemory(), Hungry(**appetite)
    fit(tmp_path, learner, [memory])
    check_windows(memory, expected, MIB, NOISE)
    assert memory.peak_bytes == max(memory.module_peak_bytes.values())
    assert hooks(learner) == []


@pytest.mark.parametrize(("appetite", "expected"), WINDOWS)
def test_windows_from_cudas_statistics(tmp_path: Path, fake_cuda: Any, appetite: Any, expected: Any) -> None:
    memory, learner = PeakMemory(), Hungry(**appetite)
    fit(tmp_path, learner, [memory])
    check_windows(memory, expected, MIB, NOISE)
    assert memory.source == CUDA_SOURCE and memory.slow_batch is None
    assert hooks(learner) == []


@pytest.mark.parametrize("batch", range(6))
def test_on_cuda_the_peak_is_that_of_all_batches_and_validation_is_not(
    tmp_path: Path, fake_cuda: StorageTracker, batch: int
) -> None:
    """Resets in the third batch do not lose earlier or later peaks."""
    memory, learner = PeakMemory(), Hungry(forward=(2, 1))
    learner.at_batch, learner.in_validation = {batch: 5}, 50
    fit(tmp_path, learner, [memory], train=6, val=1, val_check_interval=2)
    assert 5 * MIB < memory.peak_bytes <= 5 * MIB + NOISE  # type: ignore[operator]
    assert memory.reserved_bytes == 2 * memory.peak_bytes  # type: ignore[operator]
    first = 5 if batch == 2 else 2
    assert memory.module_peak_bytes == pytest.approx({"module_1": first * MIB, "module_2": MIB}, abs=NOISE)


def test_an_error_in_the_batch_measured_on_cuda_leaves_no_hook_behind(tmp_path: Path, fake_cuda: Any) -> None:
    memory = PeakMemory()
    learner = TinyLearner(stop_at(2))
    with pytest.raises(KeyError):
        fit(tmp_path, learner, [memory], train=5)
    assert hooks(learner) == []
    assert memory.module_peak_bytes == {}


@pytest.mark.gpu
@pytest.mark.parametrize(("appetite", "expected"), WINDOWS)
def test_allocated_reserved_and_windows_on_cuda(tmp_path: Path, appetite: Any, expected: Any) -> None:
    """Peaks are in units of 64 MiB, so that a cuBLAS workspace of up to 32 MiB and unsplit blocks do not matter."""
    unit = 64
    large = {key: tuple(unit * n for n in v) if isinstance(v, tuple) else unit * v for key, v in appetite.items()}
    memory, learner = PeakMemory(), Hungry(**large)
    learner.at_batch, learner.in_validation = {1: 8 * unit}, 16 * unit
    fit(tmp_path, learner, [memory], val=1, accelerator="gpu", devices=1)
    check_windows(memory, expected, unit * MIB, 40 * MIB)
    assert memory.peak_bytes is not None and memory.reserved_bytes is not None
    assert 8 * unit * MIB < memory.peak_bytes < 14 * unit * MIB
    assert memory.peak_bytes <= memory.reserved_bytes <= torch.cuda.get_device_properties(0).total_memory
    assert memory.source == CUDA_SOURCE and memory.slow_batch is None


def test_an_error_in_the_measured_batch_leaves_no_hook_behind(tmp_path: Path) -> None:
    memory = PeakMemory()
    learner = TinyLearner(stop_at(2))
    with pytest.raises(KeyError):
        fit(tmp_path, learner, [memory], train=5)
    assert hooks(learner) == []
    assert memory.module_peak_bytes == {}


def test_module_peaks_are_logged_in_gib(tmp_path: Path) -> None:
    memory = PeakMemory()
    run = fit(tmp_path, Hungry(forward=(3, 1)), [memory])
    logged = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("memory/")}
    expected = {f"memory/{name}_peak_gib": value / GIB for name, value in memory.module_peak_bytes.items()}
    assert len(expected) == 2
    assert logged == pytest.approx({**expected, "memory/peak_gib": memory.peak_bytes / GIB})  # type: ignore[operator]


class Saved(Callback):
    """Writes a checkpoint after the fourth batch, as the last of the callbacks."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.file)


def resumed(folder: Path, file: Path) -> PeakMemory:
    memory = PeakMemory()
    run = trainer(folder, callbacks=[memory], max_epochs=2)
    run.fit(Hungry(forward=(7, 7)), loader(4), ckpt_path=file, weights_only=True)
    assert run.global_step == 8
    return memory


def test_a_resumed_run_keeps_its_figures_and_measures_no_more(tmp_path: Path) -> None:
    memory, file = PeakMemory(), tmp_path / "at_4.ckpt"
    fit(tmp_path, Hungry(forward=(3, 1)), [memory, Saved(file)])
    again = resumed(tmp_path, file)
    assert again.state_dict() == memory.state_dict()
    assert len(again.module_peak_bytes) == 2 and again.slow_batch is None


def test_a_run_resumed_on_another_device_begins_anew(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    memory, file = PeakMemory(), tmp_path / "at_4.ckpt"
    fit(tmp_path, Hungry(forward=(3, 1)), [memory, Saved(file)])
    request.getfixturevalue("fake_cuda")
    again = resumed(tmp_path, file)
    assert again.source == CUDA_SOURCE
    assert again.module_peak_bytes == pytest.approx({"module_1": 7 * MIB, "module_2": 7 * MIB}, abs=NOISE)


def test_on_cuda_a_resumed_run_keeps_the_larger_peak_and_the_modules(tmp_path: Path, fake_cuda: Any) -> None:
    memory, file = PeakMemory(), tmp_path / "at_4.ckpt"
    fit(tmp_path, Hungry(forward=(3, 1)), [memory, Saved(file)])
    again = resumed(tmp_path, file)
    assert again.module_peak_bytes == memory.module_peak_bytes
    assert again.peak_bytes == pytest.approx(7 * MIB, abs=NOISE)


def test_on_cuda_a_run_killed_before_the_measured_batch_still_measures_it(tmp_path: Path, fake_cuda: Any) -> None:
    memory = PeakMemory()
    memory.load_state_dict({**memory.state_dict(), "peak_bytes": 9 * MIB, "reserved_bytes": 1, "source": CUDA_SOURCE})
    fit(tmp_path, Hungry(forward=(3, 1)), [memory])
    assert memory.peak_bytes == 9 * MIB
    assert memory.module_peak_bytes == pytest.approx({"module_1": 3 * MIB, "module_2": MIB}, abs=NOISE)


@pytest.mark.slow
def test_compiled_modules_are_counted_uncompiled(tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        memory, learner = PeakMemory(), TinyLearner()
        if compiled:
            for module in learner.local_modules:
                module.compile()
        fit(tmp_path, learner, [memory])
        found.append(memory.module_peak_bytes)
    assert found[0] == found[1] != {}

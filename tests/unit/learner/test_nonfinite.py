"""Losses and gradients that are not finite: which module leaves out its step, what is counted, said and kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from localfeat.learner.module import Learner
from localfeat.learner.nonfinite import statistics
from localfeat.methods.registry import METHODS
from localfeat.run.callbacks.nonfinite import FILE, StopOnNonFinite, read_batch
from localfeat.utils.errors import RunFailed, UserError
from tests.helpers import tiny
from tests.helpers.small import Metrics, batch, learner, loader, trainer
from tests.unit.learner.test_precision import fp16

NAN, INF = math.nan, math.inf
PLACES = [
    (method, number, term)
    for method in METHODS
    for number, module in enumerate(learner(method, 3).local_modules)
    for term in module.objective.weights
]


class Spoil(Callback):
    """Makes one term of one module's loss ``value`` in the batches ``when``, its gradient included."""

    def __init__(
        self, module: int, term: str, value: float = NAN, when: Callable[[int], bool] = lambda _: True
    ) -> None:
        self.module, self.term, self.value, self.when = module, term, value, when
        self.now = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        objective = pl_module.local_modules[self.module].objective
        objective.register_forward_hook(lambda _, inputs, output: (self.spoil(output[0]), output[1]))
        watched = objective.watched_terms
        objective.watched_terms = lambda: self.spoil(watched())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.now = self.when(trainer.global_step)

    def spoil(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.now or self.term not in terms:
            return terms
        return {**terms, self.term: terms[self.term] * self.value}


class Added(Spoil):
    """Adds infinity to it: the gradient stays as it was."""

    def spoil(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**terms, self.term: terms[self.term] + (INF if self.now else 0.0)} if self.term in terms else terms


class Overflow(Callback):
    """Makes the gradient of one module's last parameter ``value``; its loss stays as it was."""

    def __init__(self, module: int, value: float = INF, when: Callable[[int], bool] = lambda _: True) -> None:
        self.module, self.value, self.when = module, value, when

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        *_, (self.name, parameter) = pl_module.local_modules[self.module].named_parameters()
        parameter.register_hook(lambda g: g * (self.value if self.when(trainer.global_step) else 1.0))


class States(Callback):
    """Copies of everything that every module trains and keeps, after every batch; averages follow other modules."""

    def __init__(self) -> None:
        self.taken: list[list[list[Tensor]]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.taken.append(self.of(trainer, pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.taken.append(self.of(trainer, pl_module))

    def of(self, trainer: Any, pl_module: Any) -> list[list[Tensor]]:
        return [
            [
                t.detach().clone()
                for t in (*module.parameters(), *module.buffers(), *moments(optimizer))
                if t.requires_grad or not isinstance(t, nn.Parameter)
            ]
            for module, optimizer in zip(pl_module.local_modules, trainer.optimizers, strict=True)
        ]

    def changed(self, batch: int) -> list[bool]:
        """Of every module, whether a batch (from 0) changed anything; moments made of zeros are no change."""
        before, after = self.taken[batch], self.taken[batch + 1]
        return [not same(old, new) for old, new in zip(before, after, strict=True)]


def moments(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield from (value for _, value in sorted(optimizer.state[parameter].items()))


def same(old: list[Tensor], new: list[Tensor]) -> bool:
    return len(old) == len(new) and all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def small(method: Any, family: str = "vit", split: Any = 3, **optimization: Any) -> Learner:
    return learner(method, split, family, **optimization)


# --- which module leaves out which step ---


@pytest.mark.parametrize(("method", "module", "term"), PLACES)
def test_a_term_that_is_not_finite_stops_its_module_only(method: str, module: int, term: str) -> None:
    states, model = States(), small(method)
    trainer(Spoil(module, term, when=lambda step: step == 1), states).fit(model, loader(3))
    modules = len(model.local_modules)
    assert states.changed(0) == states.changed(2) == [True] * modules
    assert states.changed(1) == [number != module for number in range(modules)]
    assert model.skipped_steps == {f"module_{n + 1}": int(n == module) for n in range(modules)}
    assert model.scaler_skips is None
    assert all(t.isfinite().all() for t in model.state_dict().values())


@pytest.mark.parametrize("clip", [5.0, None])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_gradient_that_is_not_finite_is_enough(precision: str, value: float, clip: float | None) -> None:
    states, metrics, model = States(), Metrics(), small("feature_recon", gradient_clip=clip)
    trainer(Overflow(1, value, lambda step: step == 1), states, metrics, precision=precision).fit(model, loader(3))
    assert [states.changed(n) for n in range(3)] == [[True] * 3, [True, False, True], [True] * 3]
    assert model.skipped_steps == {"module_1": 0, "module_2": 1, "module_3": 0}
    assert [step["train/skipped_steps"] for step in metrics.steps] == [0, 1, 1]
    assert all(math.isfinite(v) for step in metrics.steps for v in step.values())


@pytest.mark.parametrize("where", [0, 1])
def test_statistics_of_batchnorm_stay_too(where: int) -> None:
    """Images that are NaN spoil those of all modules, a gradient those of one."""
    model, states = small("greedy_ce", "resnet", 2), States()
    images, labels = batch(12)
    images[4 + where] = NAN
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
    trainer(states, Overflow(where, when=lambda step: step == 2)).fit(model, data)
    assert all(statistics(module) for module in model.local_modules)
    assert [states.changed(n) for n in range(3)] == [[True, True], [False, False], [where != 0, where != 1]]
    assert model.skipped_steps == {"module_1": 1 + (where == 0), "module_2": 1 + (where == 1)}


@pytest.mark.parametrize(("bad", "changed"), [(2, [False, False]), (3, [True, True])])
def test_statistics_are_put_back_at_once_within_a_window(bad: int, changed: list[bool]) -> None:
    """A validation or checkpoint in the middle of it finds them as they were before it."""
    model, states = small("greedy_ce", "resnet", 2, accumulate=2), States()
    images, labels = batch(16)
    images[4 * bad] = NAN
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
    trainer(states).fit(model, data)
    assert [states.changed(n) for n in range(4)] == [[True] * 2, [True] * 2, changed, changed]
    assert all(t.isfinite().all() for taken in states.taken for module in taken for t in module)
    before, after = ([state for module in states.taken[n] for state in module] for n in (2, 4))
    assert same(before, after), "the good batch of a spoiled window leaves no trace either"


class NobodyWaits(TorchDispatchMode):
    """Refuses to bring a tensor's value to the host, which on a GPU waits for all that is queued."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "somebody waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_nobody_waits_for_the_device_within_a_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, states = Learner.training_step, States()

    def watched(self: Learner, *arguments: Any) -> None:
        with NobodyWaits():
            original(self, *arguments)

    monkeypatch.setattr(Learner, "training_step", watched)
    model = small("greedy_ce", family, 2)
    trainer(Overflow(0, when=lambda step: step == 1), states).fit(model, loader(2))
    assert states.changed(1) == [False, True]


def test_a_first_step_that_is_left_out_is_as_if_it_had_never_been() -> None:
    """Weights and moments are those of a run without the batch, but for its place in the schedule."""
    flat = {"final_lr": 1.0}
    with_it, without = small("greedy_ce", split=2, **flat), small("greedy_ce", split=2, **flat)
    images, labels = batch(12)
    images[:4] = NAN
    whole = torch.utils.data.TensorDataset(images, labels)
    for model, data in ((with_it, whole), (without, torch.utils.data.Subset(whole, range(4, 12)))):
        trainer().fit(model, torch.utils.data.DataLoader(data, batch_size=4))
    assert same(list(with_it.state_dict().values()), list(without.state_dict().values()))


def test_the_schedule_goes_on_counting_batches() -> None:
    rates = []
    for spoil in ([], [Overflow(0, when=lambda step: step in (0, 1))]):
        metrics = Metrics()
        trainer(metrics, *spoil).fit(small("greedy_ce", split=2, warmup=0.5), loader(4))
        rates.append([step["train/lr"] for step in metrics.steps])
    assert rates[0] == rates[1]


@pytest.mark.parametrize("family", ["vit", "resnet"])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_bad_batch_spoils_its_window_once(bad: int, family: str) -> None:
    states, model = States(), small("greedy_ce", family, 2, accumulate=2, lr=1e-2)
    trainer(Added(0, "cross_entropy", when=lambda step: step == 2 + bad), states).fit(model, loader(6))
    assert model.skipped_steps == {"module_1": 1, "module_2": 0}
    changed = lambda first: [not same(a, b) for a, b in zip(states.taken[first], states.taken[first + 2], strict=True)]  # noqa: E731
    assert [changed(n) for n in (0, 2, 4)] == [[True, True], [False, True], [True, True]]


# --- the end of a run ---


def failing(
    folder: Path, *callbacks: Callback, model: Learner | None = None, batches: int = 6, **arguments: Any
) -> str:
    """The line in which a run ends."""
    with pytest.raises(RunFailed) as error:
        run = trainer(*callbacks, StopOnNonFinite(), default_root_dir=folder, **arguments)
        run.fit(model or small("feature_recon", stop_after_nonfinite=3), loader(batches))
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("value", [NAN, INF])
def test_three_in_a_row_end_the_run_in_one_line(value: float, tmp_path: Path, capsys: Any) -> None:
    states = States()
    line = failing(tmp_path, states, Spoil(1, "reconstruction", value, lambda step: step not in (0, 2)))
    said = f"module 2's reconstruction is {value} at epoch 0, batch 5, and this module has skipped 3 steps in a row"
    assert line.startswith(said)
    assert "optimizer.stop_after_nonfinite=3" in line and str(tmp_path / FILE) in line
    assert len(states.taken) == 1 + 6, "at the end of a batch"
    images, labels, facts = read_batch(tmp_path / FILE)
    assert torch.equal(images, batch(8, 5)[0]) and torch.equal(labels, batch(8, 5)[1])
    assert facts.items() >= {"module": "module_2", "term": "reconstruction", "value": str(value)}.items()
    assert facts.items() >= {"epoch": "0", "batch": "5", "torch_seed": str(torch.initial_seed())}.items()
    assert "torch.manual_seed" in facts["torch_seed_note"]
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert f"module 2's reconstruction is {value} at epoch 0, batch 1" in warning


def test_the_parameter_of_a_bad_gradient_is_named(tmp_path: Path) -> None:
    spoil = Overflow(2)
    line = failing(tmp_path, spoil)
    assert line.startswith(f"module 3's gradient ({spoil.name}) is inf at epoch 0, batch 2")
    assert read_batch(tmp_path / FILE)[2]["parameter"] == spoil.name


def test_a_bad_loss_long_ago_is_not_blamed_for_a_bad_gradient(tmp_path: Path) -> None:
    early = Spoil(2, "cross_entropy", when=lambda step: step == 0)
    line = failing(tmp_path, early, Overflow(2, when=lambda step: step >= 2))
    assert line.startswith("module 3's gradient") and "epoch 0, batch 4" in line


def test_never_is_never(tmp_path: Path) -> None:
    model = small("greedy_ce", split=2, stop_after_nonfinite=None)
    trainer(Overflow(0), StopOnNonFinite(), default_root_dir=tmp_path).fit(model, loader(12))
    assert model.skipped_steps == {"module_1": 12, "module_2": 0}
    assert not (tmp_path / FILE).exists()


def test_without_the_callback_steps_are_left_out_and_counted_and_nothing_ends(tmp_path: Path, capsys: Any) -> None:
    model = small("greedy_ce", split=2, stop_after_nonfinite=3)
    trainer(Overflow(0), default_root_dir=tmp_path).fit(model, loader(6))
    assert model.skipped_steps == {"module_1": 6, "module_2": 0}
    assert list(tmp_path.iterdir()) == [] and "warning:" not in capsys.readouterr().err


def test_the_callback_watches_nothing_else(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, callbacks=[StopOnNonFinite()], max_epochs=1)
    with pytest.raises(UserError, match=r"^StopOnNonFinite works with a localfeat\.Learner, not with TinyLearner$"):
        run.fit(tiny.TinyLearner(), tiny.loader(1))


def test_the_batch_of_a_window_is_the_bad_one(tmp_path: Path) -> None:
    model = small("greedy_ce", split=2, stop_after_nonfinite=2, accumulate=2)
    line = failing(tmp_path, Spoil(1, "cross_entropy", when=lambda step: step % 2 == 0), model=model)
    assert "epoch 0, batch 2, and this module has skipped 2 steps" in line
    assert torch.equal(read_batch(tmp_path / FILE)[0], batch(8, 2)[0])


def test_a_folder_that_cannot_be_written_does_not_hide_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = failing(tmp_path / "file", Spoil(0, "contrast"))
    assert line.startswith("module 1's contrast is nan") and "could not be written" in line


# --- anomaly detection ---


def test_anomaly_detection_names_the_operation_at_once(tmp_path: Path) -> None:
    line = failing(tmp_path, Spoil(1, "contrast", when=lambda step: step == 1), detect_anomaly=True)
    assert line.startswith("module 2 at epoch 0, batch 1: MulBackward0 returned nan (its output 0)")
    assert str(tmp_path / FILE) in line
    assert read_batch(tmp_path / FILE)[2]["module"] == "module_2"


def test_anomaly_detection_ends_a_run_for_what_torch_lets_pass(tmp_path: Path) -> None:
    line = failing(tmp_path, Overflow(0, when=lambda step: step == 1), detect_anomaly=True)
    assert line.startswith("module 1's gradient") and "epoch 0, batch 1 (trainer.detect_anomaly=true)" in line


# --- a loss scale ---


def test_overflow_under_a_loss_scale_is_counted_apart_and_is_no_error() -> None:
    plugin, model = fp16(), small("greedy_ce", split=2, stop_after_nonfinite=2)
    trainer(Overflow(0, when=lambda step: step < 4), plugins=plugin).fit(model, loader(6))
    assert model.skipped_steps == {"module_1": 0, "module_2": 0}
    assert model.scaler_skips == 4
    assert plugin.scaler is not None and plugin.scaler.get_scale() == 2.0**6


def test_under_a_loss_scale_a_bad_loss_counts_even_if_its_gradient_is_finite(tmp_path: Path) -> None:
    states, model = States(), small("greedy_ce", split=2)
    trainer(Added(0, "cross_entropy", when=lambda step: step == 1), states, plugins=fp16()).fit(model, loader(3))
    assert [states.changed(n) for n in range(3)] == [[True, True], [False, True], [True, True]]
    assert (model.skipped_steps, model.scaler_skips) == ({"module_1": 1, "module_2": 0}, 0)


def test_a_scale_below_one_is_no_overflow_any_more(tmp_path: Path) -> None:
    model = small("greedy_ce", split=2, stop_after_nonfinite=2)
    line = failing(tmp_path, Overflow(0), model=model, batches=20, plugins=fp16())
    assert "module 1's gradient" in line
    assert model.scaler_skips == 11, "from a scale of 1024 down to 1"
    assert model.skipped_steps == {"module_1": 2, "module_2": 0}


# --- checkpoints ---


class SaveAt(Callback):
    """Saves a checkpoint after one batch (from 1), at the end of everything that happens in it, and kills the run."""

    def __init__(self, step: int, file: Path) -> None:
        self.step, self.file = step, file

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)
            raise InterruptedError


class Rest:
    """The batches of ``loader(batches)`` from one on, in an epoch that has all of them."""

    def __init__(self, batches: int, first: int) -> None:
        self.batches, self.first = batches, first

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (batch(8, seed) for seed in range(self.first, self.batches))


@pytest.mark.parametrize("family", ["vit", "resnet"])
@pytest.mark.parametrize("step", [4, 5, 6])
def test_a_run_goes_on_exactly_within_a_window(step: int, family: str, tmp_path: Path) -> None:
    """Also within one that is spoiled already, and with what was counted."""
    file = tmp_path / "within.ckpt"
    make = lambda: small("greedy_ce", family, 2, accumulate=3)  # noqa: E731
    spoil = lambda: Added(0, "cross_entropy", when=lambda step: step in (1, 3))  # noqa: E731
    whole, part, rest = make(), make(), make()
    trainer(Metrics(), spoil()).fit(whole, loader(9))
    with pytest.raises(InterruptedError):
        trainer(Metrics(), spoil(), SaveAt(step, file)).fit(part, loader(9))
    saved = torch.load(file, weights_only=True)
    assert ("gradients" in saved) == (step != 6)
    metrics = Metrics()
    trainer(metrics, spoil()).fit(rest, Rest(9, step), ckpt_path=file)
    assert rest.skipped_steps == whole.skipped_steps == {"module_1": 2, "module_2": 0}
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in rest.state_dict().items())


def test_steps_in_a_row_are_counted_across_a_resume(tmp_path: Path) -> None:
    file = tmp_path / "after.ckpt"
    settings: dict[str, Any] = {"split": 2, "stop_after_nonfinite": 4}
    with pytest.raises(InterruptedError):
        trainer(Overflow(1), SaveAt(3, file)).fit(small("greedy_ce", **settings), loader(6))
    with pytest.raises(RunFailed, match=r"module 2's gradient .* batch 3, and this module has skipped 4 steps"):
        run = trainer(Overflow(1), StopOnNonFinite(), default_root_dir=tmp_path)
        run.fit(small("greedy_ce", **settings), loader(6), ckpt_path=file)


def test_gradients_of_another_network_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "within.ckpt"
    with pytest.raises(InterruptedError):
        trainer(SaveAt(1, file)).fit(small("greedy_ce", split=2, accumulate=2), loader(2))
    saved = torch.load(file, weights_only=True)
    saved["gradients"]["nobody.weight"] = torch.zeros(1)
    torch.save(saved, file)
    with pytest.raises(UserError, match=r"a gradient of nobody\.weight"):
        trainer().fit(small("greedy_ce", split=2, accumulate=2), Rest(2, 1), ckpt_path=file)


def test_a_checkpoint_from_before_these_counters_loads(tmp_path: Path) -> None:
    file = tmp_path / "old.ckpt"
    with pytest.raises(InterruptedError):
        trainer(SaveAt(2, file)).fit(small("greedy_ce", split=2), loader(3))
    old = torch.load(file, weights_only=True)
    del old["nonfinite"]
    torch.save(old, file)
    model = small("greedy_ce", split=2)
    trainer().fit(model, loader(3), ckpt_path=file)
    assert model.skipped_steps == {"module_1": 0, "module_2": 0}

"""Law 7: every figure that a run prints or logs is recomputed here; test data choose nothing.

A new figure fails these tests (``KNOWN``, ``SUMMARY``, ``TABLE``) until a test recomputes it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from localfeat.data.datamodule import ImageDataModule
from localfeat.data.labelled import TensorImages
from localfeat.data.sources import Digits
from localfeat.learner.module import Learner
from localfeat.methods.registry import METHODS
from localfeat.run import train as training
from localfeat.run.build import build_callbacks, build_datamodule
from localfeat.run.callbacks import throughput
from localfeat.run.callbacks.peak_memory import GIB, PeakMemory
from localfeat.run.export import read_backbone_file
from localfeat.run.finished import saved_configuration
from localfeat.run.folder import RunFolder
from localfeat.run.loggers.metrics_csv import read_rows
from tests.helpers.whole_runs import BATCHES, checkpoint, draw_nothing, exported, files_below, metrics, small_run

TERMS = {
    "e2e": [],
    "greedy_ce": ["cross_entropy"],
    "greedy_contrast": ["contrast"],
    "image_recon": ["contrast", "reconstruction"],
    "feature_recon": ["contrast", "reconstruction"],
    "image_recon_ce": ["cross_entropy", "reconstruction"],
    "feature_recon_ce": ["cross_entropy", "reconstruction"],
    "deep_supervision": [f"{term}_{cut}" for cut in (1, 2, 3) for term in ("cross_entropy", "reconstruction")],
    "greedy_linear": ["cross_entropy"],
    "trgl": ["cross_entropy", "transport"],
    "auglocal": ["cross_entropy"],
    "dgl": ["cross_entropy"],
    "predsim": ["cross_entropy", "similarity"],
    "lopt": ["reconstruction"],
    "readout": ["cross_entropy"],
    "lookahead": ["cross_entropy"],
    "man": ["cross_entropy"],
    "man_plus": ["cross_entropy"],
}
KNOWN = {"step", "epoch", "memory/peak_gib", "speed/images_per_second", "speed/outside_step"} | {
    *(
        "train/loss",
        "train/accuracy",
        "train/lr",
        "train/skipped_steps",
        "val/loss",
        "val/accuracy",
        "test/loss",
        "test/accuracy",
    ),
}
ASKED = {"method", "dataset", "backbone", "split", "decoder", "seed", "epochs", "batch_size", "precision"}
TESTED_ELSEWHERE = {"versions", "hardware", "commit", "command", "overrides"}  # tests/unit/run/test_summary.py
MEASURED = {
    *("test_accuracy", "val_accuracy", "best_epoch", "images_per_second", "peak_memory_bytes", "peak_memory_source"),
    *("peak_reserved_bytes", "module_peak_memory_bytes", "seconds", "parameters", "module_losses", "classes"),
    *("skipped_steps", "scaler_skips"),
}
METHOD, EPOCHS, BATCH = "feature_recon", 4, 16
WHOLE_EVALUATION = ["trainer.limit_val_batches=null", "trainer.limit_test_batches=null", f"epochs={EPOCHS}"]


class Witness(Callback):
    """Keeps the modules' outputs for every training batch, by forward hooks and independently of logging."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for number, module in enumerate(pl_module.local_modules, start=1):
            module.register_forward_hook(lambda m, i, o, number=number: self.see(f"train/module_{number}", i[2], o))

    def on_train_batch_start(self, *_: Any) -> None:
        self.steps.append({})

    def see(self, module: str, labels: Tensor, output: Any) -> None:
        step = self.steps[-1]
        step[f"{module}/loss"] = output.loss.item()
        step |= {f"{module}/{name}": value.item() for name, value in output.terms.items()}
        if output.logits is not None:
            step["train/loss"] = torch.nn.functional.cross_entropy(output.logits, labels, label_smoothing=0.1).item()
            step["train/accuracy"] = output.logits.argmax(1).eq(labels).float().mean().item()


class MemoryWitness(Callback):
    """Runs torch's own memory tracker in the third batch and reads it after every operation."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != 2:
            return
        self.module = "module_1"
        for number, module in enumerate(pl_module.local_modules, start=1):
            module.register_forward_pre_hook(lambda *_, number=number: setattr(self, "module", f"module_{number}"))
        self.tracker = WatchedMemTracker(self)
        self.tracker.track_external(pl_module, *(o.optimizer for o in pl_module.optimizers()), *batch)
        self.tracker.__enter__()

    def see(self) -> None:
        now = self.tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Total"]
        self.peaks[self.module] = max(now, self.peaks.get(self.module, 0))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            self.tracker.__exit__(None, None, None)
            self.peak = self.tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


class WatchedMemTracker(MemTracker):
    def __init__(self, witness: MemoryWitness) -> None:
        super().__init__()
        self.witness = witness

    def __torch_dispatch__(self, *arguments: Any, **keywords: Any) -> Any:
        result = super().__torch_dispatch__(*arguments, **keywords)
        self.witness.see()
        return result


def with_callback(monkeypatch: pytest.MonkeyPatch, callback: Callback) -> None:
    monkeypatch.setattr(training, "build_callbacks", lambda *a, **k: [callback, *build_callbacks(*a, **k)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return folder, summary, witness and printed text of one run, evaluated on every image."""
    folder, witness = tmp_path_factory.mktemp("figures") / "run", Witness()
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        with_callback(patch, witness)
        summary = small_run(folder, f"method={METHOD}", *WHOLE_EVALUATION)
    return SimpleNamespace(folder=folder, summary=summary, steps=witness.steps, rows=metrics(folder))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row[name]]


def plain_accuracy(folder: Path, split: str, weights: dict[str, Tensor]) -> tuple[float, float]:
    """Return accuracy and loss of the plain timm model with the exported weights."""
    file = read_backbone_file(folder / "backbone.safetensors")
    model = timm.create_model(file.architecture, num_classes=10, img_size=file.img_size, **file.arguments)
    model.load_state_dict(weights)
    data = build_datamodule(saved_configuration(RunFolder(folder)))
    images, labels = (torch.cat(parts) for parts in zip(*data.ordered_loader(split), strict=True))
    inputs, truth = data.prepare(images, labels, training=False)
    with torch.no_grad():
        logits = model.eval()(inputs)
    loss = torch.nn.functional.cross_entropy(logits, truth)
    return logits.argmax(1).eq(truth).double().mean().item(), loss.item()


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m in ("e2e", "image_recon", "trgl") else pytest.mark.slow) for m in METHODS]
)
def test_law_7_no_unknown_figure_is_logged(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)
    modules = 4 if METHODS[method].local else 1
    terms = [["loss", *TERMS[method]]] * (modules - 1)
    terms += [["loss", "cross_entropy", *(["transport"] if method == "trgl" else [])]]
    terms[0] += TERMS[method] if modules == 1 else []
    expected = KNOWN | {f"train/module_{n}/{term}" for n, names in enumerate(terms, start=1) for term in names}
    expected |= {f"memory/module_{n}_peak_gib" for n in range(1, modules + 1)}
    summary = small_run(tmp_path, f"method={method}", "epochs=1")
    rows = read_rows(tmp_path / "metrics.csv")
    assert set(rows[0]) == expected
    assert all(any(row[name] for row in rows) for name in expected)
    assert set(summary) == ASKED | MEASURED | TESTED_ELSEWHERE
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert {f"train/{name}" for name in summary["module_losses"]} == {
        n for n in expected if n.startswith("train/module_")
    }


def test_law_7_training_figures_are_what_the_modules_returned(finished: Any) -> None:
    rows = [row for row in finished.rows if row["train/loss"]]
    assert len(rows) == len(finished.steps) == EPOCHS * BATCHES
    for number, (row, seen) in enumerate(zip(rows, finished.steps, strict=True)):
        assert (int(row["step"]), int(row["epoch"])) == (number, number // BATCHES)
        assert {name for name in row if name.startswith("train/")} == {*seen, "train/lr", "train/skipped_steps"}
        for name, value in seen.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-6)


def test_law_7_learning_rate_is_warm_up_and_cosine(finished: Any) -> None:
    total = EPOCHS * BATCHES
    warmup = round(0.05 * total)
    expected = [
        1e-3 * (step + 1) / (warmup + 1)
        if step < warmup
        else 1e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2)
        for step in range(total)
    ]
    assert column(finished.rows, "train/lr") == pytest.approx(expected, rel=1e-5)


def test_law_7_module_losses_are_the_last_epochs_means(finished: Any) -> None:
    sums: dict[str, float] = defaultdict(float)
    for step in finished.steps[-BATCHES:]:
        for name, value in step.items():
            sums[name] += value / BATCHES
    expected = {name.removeprefix("train/"): value for name, value in sums.items() if "/module_" in name}
    assert finished.summary["module_losses"] == pytest.approx(expected, rel=1e-5)


def test_law_7_accuracies_are_those_of_the_exported_weights_in_plain_timm(finished: Any) -> None:
    weights = exported(finished.folder)
    accuracy, loss = plain_accuracy(finished.folder, "test", weights)
    (last,) = [row for row in finished.rows if row["test/accuracy"]]
    assert last is finished.rows[-1]
    assert finished.summary["test_accuracy"] == float(last["test/accuracy"]) == pytest.approx(accuracy, abs=1e-6)
    assert float(last["test/loss"]) == pytest.approx(loss, rel=1e-5)

    accuracy, loss = plain_accuracy(finished.folder, "val", weights)
    validated = [row for row in finished.rows if row["val/accuracy"]]
    best = finished.summary["best_epoch"]
    assert [int(row["epoch"]) for row in validated] == list(range(EPOCHS))
    assert [int(row["step"]) for row in validated] == [BATCHES * (n + 1) - 1 for n in range(EPOCHS)]
    assert best == max(range(EPOCHS), key=lambda n: (float(validated[n]["val/accuracy"]), n))
    assert finished.summary["val_accuracy"] == float(validated[best]["val/accuracy"]) == pytest.approx(accuracy)
    assert float(validated[best]["val/loss"]) == pytest.approx(loss, rel=1e-5)


def test_law_7_parameters_are_those_that_the_optimizers_hold(finished: Any) -> None:
    """The numbers are recomputed from the moments in the checkpoint and from the plain timm model."""
    states = checkpoint(finished.folder)["optimizer_states"]
    modules = [sum(p["exp_avg"].numel() for p in state["state"].values()) for state in states]
    backbone = sum(p.numel() for name, p in exported(finished.folder).items() if "relative_position_index" not in name)
    expected = {f"module_{number}": count for number, count in enumerate(modules, start=1)}
    expected |= {"backbone": backbone, "total": sum(modules), "auxiliary": sum(modules) - backbone}
    assert finished.summary["parameters"] == expected
    last_stage = sum(p.numel() for name, p in exported(finished.folder).items() if name.startswith("layers.3.blocks"))
    tail = sum(p.numel() for name, p in exported(finished.folder).items() if name.startswith(("norm", "head")))
    assert expected["module_4"] == last_stage + tail


def test_law_7_what_was_asked_for_is_what_is_reported(finished: Any) -> None:
    assert {name: finished.summary[name] for name in ASKED} == {
        "method": METHOD,
        "dataset": "digits",
        "backbone": "swin_micro",
        "split": [1, 1, 1, 1],
        "decoder": "OneLayerDecoder",
        "seed": 0,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "precision": "32-true",
    }
    assert finished.summary["classes"] == [str(digit) for digit in range(10)]


def test_law_7_peak_memory_is_what_torchs_own_tracker_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)
    monkeypatch.setattr("localfeat.memory.tracker.BLOCK_BYTES", 1)  # torch's tracker rounds only on CUDA
    witness = MemoryWitness()
    summary = small_run(tmp_path / "plain", "epochs=1")
    with monkeypatch.context() as patch:
        with_callback(patch, witness)
        patch.setattr(PeakMemory, "on_train_batch_start", lambda *_: None)
        small_run(tmp_path / "witness", "epochs=1")
    assert summary["peak_memory_bytes"] == pytest.approx(witness.peak, rel=0.001)
    assert summary["peak_memory_source"] == "allocator accounting of one training batch"
    assert summary["peak_reserved_bytes"] is None
    by_module = summary["module_peak_memory_bytes"]
    assert list(by_module) == ["module_1", "module_2", "module_3", "module_4"]
    assert by_module == pytest.approx(witness.peaks, rel=0.001)
    assert max(by_module.values()) == summary["peak_memory_bytes"] > 1.05 * min(by_module.values())
    rows = read_rows(tmp_path / "plain" / "metrics.csv")
    assert column(rows, "memory/peak_gib") == [pytest.approx(summary["peak_memory_bytes"] / GIB)]
    for name, peak in by_module.items():
        assert column(rows, f"memory/{name}_peak_gib") == [pytest.approx(peak / GIB)]
    at_least = 3 * 4 * summary["parameters"]["total"]  # weights and two moments of every parameter
    largest = max(count for name, count in summary["parameters"].items() if name.startswith("module_"))
    assert summary["peak_memory_bytes"] > at_least + 4 * largest  # and the gradients of one module


def test_law_7_speed_and_time_against_a_clock_that_only_batches_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    seconds = {"training_step": 0.25, "validation_step": 1.0, "test_step": 50.0}
    for name, duration in seconds.items():
        own = getattr(Learner, name)

        def slowed(*args: Any, own: Any = own, duration: float = duration) -> Any:
            clock.now += duration
            return own(*args)

        monkeypatch.setattr(Learner, name, slowed)
    summary = small_run(tmp_path)
    rows = read_rows(tmp_path / "metrics.csv")
    assert column(rows, "speed/images_per_second") == [BATCH / 0.25] * 3
    assert column(rows, "speed/outside_step") == [0.0] * 3
    assert summary["images_per_second"] == BATCH / 0.25
    assert summary["seconds"] == 3 * (BATCHES * 0.25 + 2 * 1.0)


def test_law_7_speed_is_the_median_of_the_epochs(finished: Any) -> None:
    logged = column(read_rows(finished.folder / "metrics.csv"), "speed/images_per_second")
    assert finished.summary["images_per_second"] == pytest.approx(median(logged))
    assert finished.summary["seconds"] > sum(BATCH * BATCHES / 4 / speed for speed in logged)


def test_law_7_the_printed_figures_are_the_logged_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = small_run(tmp_path, "callbacks.progress_bar=true")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()]
    total = summary["parameters"]["total"]
    expected = [
        "feature_recon on digits: swin_micro at 16 px",
        f"{total / 1e6:.1f} M parameters, K=4 of 1+1+1+1 blocks, 1,294 images, cpu",
    ]
    rows = read_rows(tmp_path / "metrics.csv")
    for number in range(3):
        row = rows[BATCHES * (number + 1) - 1]
        expected.append(
            f"epoch {number + 1}/3 loss {float(row['train/loss']):.4f} "
            f"val accuracy {100 * float(row['val/accuracy']):.2f} % "
            f"images/s {float(row['speed/images_per_second']):,.0f}"
        )
    parts, by_module = summary["parameters"], summary["module_peak_memory_bytes"]
    heaviest = max(by_module, key=by_module.get)
    source = "allocator accounting of one training batch"
    expected += [
        f"test accuracy {100 * summary['test_accuracy']:.2f} % (on 32 of 359 images)",
        f"val accuracy {100 * summary['val_accuracy']:.2f} %",
        f"images/s {summary['images_per_second']:,.0f}",
        f"peak memory {summary['peak_memory_bytes'] / 2**30:.3f} GiB, {heaviest} ({source})",
        f"parameters {parts['total']:,} (backbone {parts['backbone']:,}, auxiliary {parts['auxiliary']:,})",
    ]
    assert lines[: len(expected)] == expected
    assert "".join(lines[len(expected) :]).replace(" ", "") == f"folder{tmp_path}"


# --- the test set is never used to choose anything ---


def test_law_7_the_test_set_is_not_touched_before_training_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    load, loader, ordered = Digits.load, ImageDataModule.test_dataloader, ImageDataModule.ordered_loader
    monkeypatch.setattr(Digits, "load", lambda self, split: events.append(f"load {split}") or load(self, split))
    monkeypatch.setattr(ImageDataModule, "test_dataloader", lambda self: events.append("test loader") or loader(self))
    monkeypatch.setattr(
        ImageDataModule, "ordered_loader", lambda self, split: events.append(f"read {split}") or ordered(self, split)
    )
    load_best = training._load_best
    monkeypatch.setattr(training, "_load_best", lambda *a: events.append("chosen") or load_best(*a))
    small_run(tmp_path)
    chosen = events.index("chosen")
    assert not any("test" in event for event in events[:chosen])
    assert [event for event in events[chosen:] if "test" in event] == ["test loader", "read test", "load test"]


@pytest.mark.slow
def test_law_7_other_test_labels_change_nothing_but_test_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small_run(tmp_path / "first", *WHOLE_EVALUATION)
    load = Digits.load

    def other(self: Digits, split: str) -> TensorImages:
        data = load(self, split)
        return TensorImages(data.images.flip(0), (data.labels + 1) % 10) if split == "test" else data

    monkeypatch.setattr(Digits, "load", other)
    second = small_run(tmp_path / "second", *WHOLE_EVALUATION)
    changed = {name for name in first if first[name] != second[name]}
    assert "test_accuracy" in changed
    assert changed <= {"test_accuracy", "seconds", "images_per_second", "commit"}
    torch.testing.assert_close(exported(tmp_path / "second"), exported(tmp_path / "first"), rtol=0, atol=0)
    assert files_below(tmp_path / "first") == files_below(tmp_path / "second")
    ours, theirs = metrics(tmp_path / "second"), metrics(tmp_path / "first")
    for row, other_row in zip(ours, theirs, strict=True):
        assert {k: v for k, v in row.items() if not k.startswith("test/")} == {
            k: v for k, v in other_row.items() if not k.startswith("test/")
        }
    pictures = [(tmp_path / name / "reconstructions.png").read_bytes() for name in ("first", "second")]
    assert pictures[0] == pictures[1]


def test_test_false_leaves_the_test_set_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the test set was read")

    monkeypatch.setattr(ImageDataModule, "test_dataloader", refuse)
    monkeypatch.setattr(training, "_check_shares", lambda *_: None)  # it would ask the test loader for its length
    summary = small_run(tmp_path, "test=false")
    assert summary["test_accuracy"] is None
    assert summary["val_accuracy"] is not None
    assert not any(name.startswith("test/") and value for row in metrics(tmp_path) for name, value in row.items())


def test_the_commit_is_the_one_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    surroundings = {"versions": {}, "hardware": {}, "command": ""}
    monkeypatch.setattr(training, "environment", lambda: {**surroundings, "commit": {"id": "what ran"}})
    fit = training.lightning.Trainer.fit

    def fit_and_commit(*arguments: Any, **named: Any) -> None:
        fit(*arguments, **named)
        monkeypatch.setattr(training, "environment", lambda: {**surroundings, "commit": {"id": "made meanwhile"}})

    monkeypatch.setattr(training.lightning.Trainer, "fit", fit_and_commit)
    draw_nothing(monkeypatch)
    assert small_run(tmp_path, "epochs=1")["commit"] == {"id": "what ran"}

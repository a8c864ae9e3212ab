"""The effects of a run's options: averaged weights, early stopping, no validation, limits, initial weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file

from localfeat.learner.module import Learner
from localfeat.run import train as training
from localfeat.run.build import build_callbacks
from localfeat.run.folder import RunFolder
from localfeat.utils.errors import UserError
from tests.helpers.whole_runs import BATCHES, checkpoint, draw_nothing, exported, metrics, small_run


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


class Weights(Callback):
    """Keeps copies of the backbone's weights from the start and after every batch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def keep(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        self.steps.append({name: p.detach().clone() for name, p in pl_module.backbone.named_parameters()})

    on_train_start = on_train_batch_end = keep


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> Weights:
    witness = Weights()
    monkeypatch.setattr(training, "build_callbacks", lambda *a, **k: [witness, *build_callbacks(*a, **k)])
    return witness


def accuracies(folder: Path) -> list[float]:
    return [float(row["val/accuracy"]) for row in metrics(folder) if row.get("val/accuracy")]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_averaged_weights_are_exported(accumulate: int, tmp_path: Path, weights: Weights) -> None:
    """The average is recomputed from the weights after every optimizer step, starting with the first."""
    decay = 0.7
    options = ["dataset.val_fraction=0", f"callbacks.ema={decay}", f"optimizer.accumulate={accumulate}"]
    small_run(tmp_path, *options)
    after_steps = weights.steps[accumulate::accumulate]
    average = dict(after_steps[0])
    for current in after_steps[1:]:
        average = {name: decay * average[name] + (1 - decay) * value for name, value in current.items()}
    found = exported(tmp_path)
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(found[name], value) for name, value in weights.steps[-1].items())


def test_averaged_weights_are_the_ones_validated(tmp_path: Path) -> None:
    plain = small_run(tmp_path / "plain", "epochs=1")
    kept = small_run(tmp_path / "kept", "epochs=1", "callbacks.ema=0.999999")
    train = [[row["train/loss"] for row in metrics(tmp_path / name)] for name in ("plain", "kept")]
    assert train[0] == train[1], "averaging does not touch training"
    assert metrics(tmp_path / "kept")[3]["val/loss"] != metrics(tmp_path / "plain")[3]["val/loss"]
    assert kept["parameters"] == plain["parameters"]


def test_early_stopping(tmp_path: Path) -> None:
    """With almost no learning rate nothing improves, so the run ends after two more epochs."""
    summary = small_run(tmp_path, "epochs=9", "callbacks.early_stopping=2", "optimizer.lr=1e-12")
    assert summary["epochs"] == 3 == len(accuracies(tmp_path))
    assert checkpoint(tmp_path)["global_step"] == 3 * BATCHES


def test_of_equal_epochs_the_latest_is_the_best(tmp_path: Path) -> None:
    summary = small_run(tmp_path, "optimizer.lr=1e-12")
    assert len(set(accuracies(tmp_path))) == 1
    assert summary["best_epoch"] == checkpoint(tmp_path, "best")["epoch"] == 2


def test_the_best_epoch_is_exported_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Learner.on_train_epoch_start

    def ruin(self: Learner) -> None:
        own(self)
        if self.trainer.current_epoch == 2:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.zero_()

    monkeypatch.setattr(Learner, "on_train_epoch_start", ruin)
    summary = small_run(tmp_path)
    figures = accuracies(tmp_path)
    assert summary["best_epoch"] < 2 and summary["val_accuracy"] == max(figures) > figures[2]
    best = checkpoint(tmp_path, "best")["state_dict"]
    found = exported(tmp_path)["head.fc.weight"]
    assert any(v.shape == found.shape and torch.equal(v, found) for v in best.values())
    assert found.abs().max() > 0.001


@pytest.mark.parametrize("options", [["callbacks.ema=0.9", "optimizer.accumulate=2"], []])
def test_without_validation_the_last_weights_count_and_nothing_is_said(
    options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        summary = small_run(tmp_path, "dataset.val_fraction=0", "callbacks.progress_bar=true", *options)
    assert [str(w.message) for w in caught] == []
    assert (summary["best_epoch"], summary["val_accuracy"]) == (None, None)
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()
    assert "val/accuracy" not in metrics(tmp_path)[0]
    last = checkpoint(tmp_path)
    assert last["epoch"] == 2 and last["global_step"] == 3 * BATCHES
    found = exported(tmp_path)["head.fc.weight"]
    assert any(v.shape == found.shape and torch.equal(v, found) for v in last["state_dict"].values())
    printed = capfd.readouterr()
    assert printed.err == "" and "val accuracy" not in printed.out


def test_an_ordinary_run_says_nothing_on_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        small_run(tmp_path, "callbacks.checkpoint_every_n_batches=1", "epochs=1", "trainer.precision=bf16-mixed")
    assert [str(w.message) for w in caught] == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("every", [2, 5])
def test_the_last_state_is_kept_however_rarely_checkpoints_are_written(every: int, tmp_path: Path) -> None:
    small_run(tmp_path, "dataset.val_fraction=0", f"callbacks.checkpoint_every_n_epochs={every}")
    assert checkpoint(tmp_path)["global_step"] == 3 * BATCHES


@pytest.mark.parametrize("steps", [4, 6])
def test_max_steps_ends_after_so_many_batches(steps: int, tmp_path: Path) -> None:
    summary = small_run(tmp_path, f"trainer.max_steps={steps}", "trainer.log_every_n_steps=10")
    rows = metrics(tmp_path)
    assert checkpoint(tmp_path)["global_step"] == steps
    assert rows[-1]["test/accuracy"] and max(int(row["step"]) for row in rows) == steps
    assert any(row["train/loss"] for row in rows), "a short run logs training figures too"
    assert summary["module_losses"]


@pytest.mark.parametrize(("limit", "batches"), [("3", 3), ("0.1", 8), pytest.param("null", 80, marks=pytest.mark.slow)])
def test_limits_of_batches(limit: str, batches: int, tmp_path: Path) -> None:
    """Validation leaves 1,294 of the 1,438 training images: 80 batches of 16."""
    small_run(tmp_path, "epochs=1", f"trainer.limit_train_batches={limit}", "method=e2e")
    assert checkpoint(tmp_path)["global_step"] == batches


# --- initial weights ---


def initial_file(file: Path, classes: int) -> dict[str, torch.Tensor]:
    """Write weights of the small Swin of ``SMALL`` with a classifier of ``classes``, as in published files."""
    torch.manual_seed(42)
    arguments = {"patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2]}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=classes, img_size=16, **arguments)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"model": state}, file)
    return state


@pytest.mark.parametrize(("name", "classes"), [("weights.safetensors", 1000), ("weights.pth", 10)])
def test_initial_weights_arrive_but_for_the_classifier(
    name: str, classes: int, tmp_path: Path, weights: Weights
) -> None:
    given = initial_file(tmp_path / name, classes)
    small_run(tmp_path / "run", f"backbone.weights={tmp_path / name}", "epochs=1", "method=greedy_ce")
    start, end = weights.steps[0], exported(tmp_path / "run")
    for key, value in start.items():
        if not key.startswith("head."):
            assert torch.equal(value, given[key]), key
            alone = key.endswith("bias_table") and len(value) == 1  # for a window of one token softmax cancels it
            assert alone or not torch.equal(end[key], given[key]), "and they are trained"
    assert start["head.fc.weight"].shape[0] == 10
    assert classes != 10 or not torch.equal(start["head.fc.weight"], given["head.fc.weight"])
    assert RunFolder(tmp_path / "run").read_config()["backbone"]["weights"] == str(tmp_path / name)


def test_initial_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    initial_file(tmp_path / "w.pth", 10)
    with pytest.raises(UserError, match=r"same architecture|same timm model"):
        small_run(tmp_path / "run", f"backbone.weights={tmp_path / 'w.pth'}", "backbone.arguments.embed_dim=16")
    with pytest.raises(UserError, match="come from one of them"):
        small_run(tmp_path / "run", f"backbone.weights={tmp_path / 'w.pth'}", "backbone.pretrained=true")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_seed_is_another_run_and_the_same_one_the_same(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        small_run(tmp_path / name, f"seed={seed}", "epochs=1", "dataset.augmentation=swin")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    torch.testing.assert_close(exported(tmp_path / "a"), exported(tmp_path / "b"), rtol=0, atol=0)
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")

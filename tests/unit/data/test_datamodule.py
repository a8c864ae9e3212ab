"""The datamodule: options, batches and exact resume under a real Trainer."""

import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from localfeat.data.datamodule import ImageDataModule
from localfeat.utils.errors import UserError
from tests.helpers.formats import write_image_folder


class Tiny(lightning.LightningModule):
    """Linear classifier that records the batches it saw."""

    def __init__(self, fail_at: int | None = None, asks_for_steps: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 10)
        self.seen: list[tuple[int, Tensor]] = []
        self.fail_at, self.asks_for_steps = fail_at, asks_for_steps

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        if self.fail_at == self.trainer.global_step:
            raise RuntimeError("lost power")
        self.seen.append((self.trainer.current_epoch, batch[0].flatten(1).double().sum(1)))
        images, labels = self.trainer.datamodule.prepare(*batch, training=True)  # type: ignore[attr-defined]
        return nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val/count", float(len(batch[0])), reduce_fx="sum", batch_size=len(batch[0]))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.asks_for_steps:
            assert self.trainer.estimated_stepping_batches > 0  # sets the loaders up before any state is loaded
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Save(lightning.Callback):
    """Save a checkpoint in ``hook`` when ``step`` batches were trained, then stop as if killed."""

    def __init__(self, hook: str, step: int, path: Path) -> None:
        self.step, self.path = step, path
        setattr(self, hook, self._save)

    def _save(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def make(**changes: Any) -> ImageDataModule:
    return ImageDataModule("digits", **{"image_size": 8, "batch_size": 200, "augmentation": "none"} | changes)


def make_trainer(*callbacks: lightning.Callback, **changes: Any) -> lightning.Trainer:
    options = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "callbacks": list(callbacks)}
    return lightning.Trainer(**options | quiet | changes)


def fit(trainer: lightning.Trainer, model: Tiny, data: ImageDataModule, path: Path | None = None) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of training batches")
        trainer.fit(model, datamodule=data, ckpt_path=path)


def same_batches(first: list[tuple[int, Tensor]], second: list[tuple[int, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        a == b and torch.equal(x, y) for (a, x), (b, y) in zip(first, second, strict=True)
    )


@pytest.fixture(scope="module")
def whole_run() -> list[tuple[int, Tensor]]:
    model = Tiny()
    fit(make_trainer(), model, make())
    assert len(model.seen) == 18  # 1,294 training images, 6 batches in each of 3 epochs
    return model.seen


@pytest.mark.parametrize("asks_for_steps", [False, True])
@pytest.mark.parametrize(
    ("hook", "step", "trained"),
    [
        ("on_train_batch_end", 1, 1),
        ("on_train_batch_end", 9, 9),
        ("on_train_batch_end", 12, 12),  # the last batch of an epoch
        ("on_validation_end", 10, 10),  # within an epoch: val_check_interval=2
        ("on_validation_end", 12, 12),
        ("on_train_epoch_end", 6, 6),
        ("on_train_batch_start", 8, 8),
        ("on_train_start", 0, 0),
    ],
)
def test_resume_sees_exactly_the_remaining_batches(
    hook: str, step: int, trained: int, asks_for_steps: bool, tmp_path: Path, whole_run: list[tuple[int, Tensor]]
) -> None:
    path = tmp_path / "x.ckpt"
    killed, interval = Tiny(), {"val_check_interval": 2 if hook == "on_validation_end" else 1.0}
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(make_trainer(Save(hook, step, path), **interval), killed, make())
    assert same_batches(killed.seen, whole_run[:trained])
    resumed, data = Tiny(asks_for_steps=asks_for_steps), make()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "You're resuming from a checkpoint")
        fit(make_trainer(**interval), resumed, data, path)
    assert same_batches(resumed.seen, whole_run[trained:])
    assert data.state_dict()["epoch"] == 3 and data.state_dict()["batch"] == 0


def test_a_step_that_failed_is_repeated(tmp_path: Path, whole_run: list[tuple[int, Tensor]]) -> None:
    class SaveOnError(lightning.Callback):
        def on_exception(self, trainer: lightning.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    with pytest.raises(RuntimeError, match="lost power"):
        fit(make_trainer(SaveOnError()), Tiny(fail_at=8), make())
    resumed = Tiny()
    fit(make_trainer(), resumed, make(), tmp_path / "x.ckpt")
    assert same_batches(resumed.seen, whole_run[8:])


def test_resuming_twice(tmp_path: Path, whole_run: list[tuple[int, Tensor]]) -> None:
    first, second = tmp_path / "1.ckpt", tmp_path / "2.ckpt"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(make_trainer(Save("on_train_batch_end", 8, first)), Tiny(), make())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(make_trainer(Save("on_train_batch_end", 10, second)), Tiny(), make(), first)
    resumed = Tiny()
    fit(make_trainer(), resumed, make(), second)
    assert same_batches(resumed.seen, whole_run[10:])


def test_one_datamodule_for_two_fits(tmp_path: Path, whole_run: list[tuple[int, Tensor]]) -> None:
    path, data = tmp_path / "x.ckpt", make()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(make_trainer(Save("on_train_batch_end", 8, path)), Tiny(), data)
    resumed, anew = Tiny(), Tiny()
    fit(make_trainer(), resumed, data, path)
    fit(make_trainer(), anew, data)
    assert same_batches(resumed.seen, whole_run[8:]) and same_batches(anew.seen, whole_run)


def test_limited_epochs_resume_exactly(tmp_path: Path) -> None:
    path, whole, resumed = tmp_path / "x.ckpt", Tiny(), Tiny()
    fit(make_trainer(limit_train_batches=4), whole, make())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(make_trainer(Save("on_train_batch_end", 4, path), limit_train_batches=4), Tiny(), make())
    fit(make_trainer(limit_train_batches=4), resumed, make(), path)
    assert len(whole.seen) == 12 and same_batches(resumed.seen, whole.seen[4:])


def test_other_batches_within_an_epoch_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(make_trainer(Save("on_train_batch_end", 2, path)), Tiny(), make())
    with pytest.raises(UserError, match=r"batch_size=100 cannot resume.*batch_size=200"):
        fit(make_trainer(), Tiny(), make(batch_size=100), path)
    make_trainer().test(Tiny(), datamodule=make(batch_size=100), ckpt_path=path, verbose=False)


def test_seed_decides_order_and_split(whole_run: list[tuple[int, Tensor]]) -> None:
    again, other = Tiny(), Tiny()
    torch.manual_seed(7)
    fit(make_trainer(max_epochs=1), again, make())
    fit(make_trainer(max_epochs=1), other, make(seed=1))
    assert same_batches(again.seen, whole_run[:6]) and not same_batches(other.seen, again.seen)


def test_fit_never_loads_the_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make()
    loaded: list[str] = []
    load = data.source.load
    monkeypatch.setattr(data.source, "load", lambda split: loaded.append(split) or load(split), raising=False)
    trainer, model = make_trainer(), Tiny()
    fit(trainer, model, data)
    assert loaded == ["train"]
    results = trainer.test(model, datamodule=data, verbose=False)
    assert loaded == ["train", "test"] and results[0]["val/count"] == 359


def test_splits_are_disjoint_and_complete() -> None:
    data = make(batch_size=64)
    parts = {name: [images for images, _ in data.ordered_loader(name)] for name in ("train", "val", "test")}
    flat = {name: torch.cat(images).flatten(1) for name, images in parts.items()}
    assert [len(images) for images in flat.values()] == [1294, 144, 359]
    rows = torch.cat(list(flat.values())).unique(dim=0)
    assert len(rows) == 1797  # no two digits are equal, so any overlap would show
    labels = torch.cat([labels for _, labels in data.ordered_loader("val")])
    assert torch.bincount(labels).min() >= 14
    assert len(data.train_dataloader()) == 20 and len(data.val_dataloader()) == 3


def test_without_validation() -> None:
    data, model = make(val_fraction=0.0), Tiny()
    fit(make_trainer(max_epochs=1), model, data)
    assert len(model.seen) == 7
    with pytest.raises(UserError, match="no validation split: val_fraction=0"):
        data.ordered_loader("val")


def test_loading_does_not_touch_the_global_generator() -> None:
    data = make()
    data.train_dataloader()
    before = torch.get_rng_state()
    list(data.train_dataloader())
    list(data.ordered_loader("test"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_files_resume_exactly(workers: int, tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"train": 20, "test": 2}, classes=10, size=(8, 8))
    options = {"root": tmp_path, "image_size": 7, "batch_size": 12, "in_memory": False, "num_workers": workers}

    def folder() -> ImageDataModule:
        return ImageDataModule("image_folder", augmentation="none", **options)  # type: ignore[arg-type]

    class Sums(Tiny):
        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:  # type: ignore[override]
            self.seen.append((self.trainer.current_epoch, batch[0].flatten(1).double().sum(1)))

    limits = {"limit_val_batches": 0, "max_epochs": 2}
    whole, path, resumed = Sums(), tmp_path / "x.ckpt", Sums()
    fit(make_trainer(**limits), whole, folder())
    saved = _SaveAfter(20, path)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(make_trainer(saved, **limits), Sums(), folder())
    fit(make_trainer(**limits), resumed, folder(), path)
    assert len(whole.seen) == 30 and same_batches(resumed.seen, whole.seen[20:])


class _SaveAfter(lightning.Callback):
    """`Save` for a model that takes no optimizer steps."""

    def __init__(self, batches: int, path: Path) -> None:
        self.left, self.path = batches, path

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1295}, "batch_size=1295 is larger than the 1294 training images"),
        ({"eval_batch_size": 0}, "eval_batch_size=0"),
        ({"augmentation": "strong"}, "augmentation=strong: it is one of swin, light, none"),
        ({"mixup": -0.1}, "mixup=-0.1"),
        ({"cutmix": float("nan")}, "cutmix=nan"),
        ({"val_fraction": 1.0}, r"val_fraction=1.0.*\[0, 1\)"),
        ({"val_fraction": -0.1}, "val_fraction=-0.1"),
        ({"image_size": 0}, "image_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"mean": [0.5]}, r"mean=\[0.5\]"),
        ({"std": [0.5, 0.5, 0.0]}, "std must be above 0"),
    ],
)
def test_mistakes_are_named_at_construction(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make(**changes)
    assert "\n" not in str(error.value)


def test_validation_too_small_for_the_classes() -> None:
    with pytest.raises(UserError, match=r"fraction of 0\.001 leaves class"):
        make(val_fraction=0.001).train_dataloader()


def test_unknown_split() -> None:
    with pytest.raises(UserError, match="'valid'"):
        make().ordered_loader("valid")

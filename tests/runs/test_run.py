"""Law 6: one config in, one folder out with a known set of files; a killed and resumed run ends bit for bit the same.

(Law 7 is in test_run_figures.py.)
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from omegaconf import OmegaConf

from localfeat.run.command import run
from localfeat.run.composition import plain
from localfeat.utils.errors import UserError
from tests.helpers.whole_runs import (
    BATCHES,
    SMALL,
    TIMED,
    checkpoint,
    child_exit,
    composed,
    draw_nothing,
    exported,
    files_below,
    killed_run,
    made_once,
    metrics,
    small_run,
)

FILES = {
    "config.yaml",
    "metrics.csv",
    "summary.json",
    "backbone.safetensors",
    "learning_curves.png",
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
}
OWN_TO_A_PROCESS = {"seconds", "images_per_second", "commit", "command"}

VARIANTS = {
    "feature_recon": ["callbacks.checkpoint_every_n_batches=3"],
    "e2e bf16 augmented": [
        "method=e2e",
        "trainer.precision=bf16-mixed",
        "dataset.augmentation=swin",
        "dataset.mixup=0.5",
        "backbone.drop_path_rate=0.3",
        "callbacks.checkpoint_every_n_batches=2",
    ],
    "feature_recon bf16 averaged and accumulated": [
        "trainer.precision=bf16-mixed",
        "callbacks.ema=0.8",
        "optimizer.accumulate=2",
        "callbacks.checkpoint_every_n_batches=1",
    ],
    "greedy_contrast by epochs": ["method=greedy_contrast", "split=k2", "callbacks.early_stopping=9"],
}
# Where the run is killed. Counted from 0: epoch 1 is the second of three, of four batches each.
KILLS: dict[str, dict[str, Any]] = {
    "in an epoch": {"hook": "on_train_batch_start", "epoch": 1, "batch": 3},
    "before validation": {"hook": "on_validation_start", "epoch": 1},
    "at an epoch's end": {"hook": "on_train_epoch_start", "epoch": 2},
    "before the test": {"hook": "on_test_start", "epoch": 3},
}
QUICK = [
    ("e2e bf16 augmented", "in an epoch"),
    ("greedy_contrast by epochs", "at an epoch's end"),
]
"""Where the default tests kill the run; the tests of stops have other moments."""


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


quickly = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function for folder and summary of a variant's uninterrupted run, made once."""
    return made_once(tmp_path_factory, VARIANTS)


def assert_same_run(folder: Path, summary: dict[str, Any], expected: tuple[Path, dict[str, Any]]) -> None:
    """Assert that files, weights, optimizers and all figures but timings are equal bit for bit."""
    whole_folder, whole_summary = expected
    assert files_below(folder) == files_below(whole_folder)
    for name in ("last", "best"):
        ours, theirs = checkpoint(folder, name), checkpoint(whole_folder, name)
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    torch.testing.assert_close(exported(folder), exported(whole_folder), rtol=0, atol=0)
    assert metrics(folder) == metrics(whole_folder)
    assert without(summary, OWN_TO_A_PROCESS) == without(whole_summary, OWN_TO_A_PROCESS)


def without(values: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


@pytest.mark.parametrize(("method", "more"), [("feature_recon", {"reconstructions.png"}), ("greedy_ce", set())])
def test_law_6_one_folder_with_a_known_set_of_files(method: str, more: set[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    small_run(folder, f"method={method}")
    assert files_below(tmp_path) == {f"run/{name}" for name in FILES | more}
    assert OmegaConf.load(folder / "config.yaml") == plain(composed(*SMALL, f"method={method}"))


@quickly
@pytest.mark.parametrize(
    ("variant", "moment"),
    [pytest.param(v, k, marks=[] if (v, k) in QUICK else pytest.mark.slow) for v in VARIANTS for k in KILLS],
)
def test_law_6_a_killed_run_resumed_ends_the_same(variant: str, moment: str, whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed_run(folder, *VARIANTS[variant], **KILLS[moment])
    assert_same_run(folder, run(composed(f"resume={folder}"), "not used"), whole(variant))


@quickly
@pytest.mark.slow
def test_law_6_killed_again_and_again_and_moved(whole: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    killed_run(first, *VARIANTS["feature_recon"], hook="on_train_batch_start", epoch=1, batch=2)
    shutil.move(first, second)
    killed_run(second, resume=True, hook="on_train_batch_start", epoch=2, batch=3)  # within the last epoch
    assert_same_run(second, run(composed(f"resume={second}"), "not used"), whole("feature_recon"))
    assert not first.exists()


@quickly
def test_law_6_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    killed_run(folder, *VARIANTS["feature_recon"], hook="on_train_epoch_start", epoch=1)
    before = (folder / "checkpoints" / "last.ckpt").read_bytes()

    def half(content: Any, file: BinaryIO) -> None:
        file.write(b"half a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr("localfeat.run.checkpoints.files.torch.save", half)
        assert child_exit(lambda: run(composed(f"resume={folder}"), "not used")) == -signal.SIGKILL
    assert [path for path in folder.rglob("*.part")]
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before
    assert_same_run(folder, run(composed(f"resume={folder}"), "not used"), whole("feature_recon"))


@quickly
@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (3, 1), (4, 1), (3, 2)])
def test_law_6_when_checkpoints_are_written(
    every: int, accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are due every few batches, or at the epoch's end if it is next. Accumulated gradients are saved, too."""
    written = []

    def note(trainer: Any, file: Path) -> None:
        written.append((trainer.global_step, file.stem))

    monkeypatch.setattr("lightning.Trainer.save_checkpoint", note)
    monkeypatch.setattr("localfeat.run.train._load_best", lambda *_: None)
    small_run(
        tmp_path,
        "method=greedy_ce",
        "split=k2",
        f"callbacks.checkpoint_every_n_batches={every}",
        f"optimizer.accumulate={accumulate}",
        "callbacks.checkpoint_every_n_epochs=2",
    )
    expected, due = [], False
    for step in range(1, 3 * BATCHES + 1):
        due = due or step % every == 0
        in_epoch = (step - 1) % BATCHES + 1
        if in_epoch == BATCHES:
            due = due or step // BATCHES in (2, 3)  # every second epoch, and the last
        if due:
            expected.append(step)
            due = False
    assert [step for step, name in written if name == "last"] == expected
    assert {step for step, name in written if name == "best"} <= {BATCHES, 2 * BATCHES, 3 * BATCHES}


@quickly
def test_law_6_a_folder_with_a_run_in_it_takes_no_other(tmp_path: Path) -> None:
    """Neither an ended nor a resumable run may be overwritten; a run without a checkpoint may."""
    small_run(tmp_path, "epochs=1")
    assert_refused_untouched(tmp_path, "holds a run that has ended", "method=greedy_ce")
    (tmp_path / "summary.json").unlink()
    assert_refused_untouched(tmp_path, "was cut short: resume=", "method=greedy_ce")
    for name in ("best", "last"):
        (tmp_path / "checkpoints" / f"{name}.ckpt").unlink()
    earlier = (tmp_path / "metrics.csv").read_bytes()
    summary = small_run(tmp_path, "epochs=1", "method=greedy_ce", "dataset.val_fraction=0")
    assert files_below(tmp_path) == FILES - {"checkpoints/best.ckpt"} | {"metrics.1.csv", "reconstructions.png"}
    assert (tmp_path / "metrics.1.csv").read_bytes() == earlier
    assert summary["best_epoch"] is None and summary["val_accuracy"] is None


def assert_refused_untouched(folder: Path, line: str, *overrides: str) -> None:
    before = {name: (folder / name).read_bytes() for name in files_below(folder)}
    with pytest.raises(UserError, match=line):
        small_run(folder, *overrides)
    assert {name: (folder / name).read_bytes() for name in files_below(folder)} == before


@quickly
@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ("split.modules=9", "split"),
        ("method.temperature=-1", "temperature"),
        ("dataset.batch_size=5000", "batch_size"),
        ("epochs=0", "epochs"),
    ],
)
def test_law_6_a_run_that_cannot_be_touches_no_file(wrong: str, key: str, tmp_path: Path) -> None:
    small_run(tmp_path, "epochs=1")
    (tmp_path / "summary.json").unlink()
    (tmp_path / "checkpoints" / "last.ckpt").unlink()  # a new run could start in this folder
    assert_refused_untouched(tmp_path, key, wrong)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_law_6_the_command_line_killed_from_outside(tmp_path: Path) -> None:
    """Kill ``python -m localfeat.run`` at three arbitrary moments, then let it finish."""
    command = [sys.executable, "-m", "localfeat.run"]
    overrides = [*SMALL, "epochs=30", "callbacks.checkpoint_every_n_batches=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *overrides, f"hydra.run.dir={tmp_path}/whole"], check=True, env=environment)
    folder, asked = tmp_path / "killed", [*overrides, f"hydra.run.dir={tmp_path}/killed"]
    for rows in (10, 37, 80):
        process = subprocess.Popen([*command, *asked], env=environment)
        while process.poll() is None and count_rows(folder / "metrics.csv") < rows:
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        asked = [f"resume={folder}"]
    subprocess.run([*command, *asked], check=True, env=environment)
    assert metrics(folder) == metrics(tmp_path / "whole")
    torch.testing.assert_close(exported(tmp_path / "killed"), exported(tmp_path / "whole"), rtol=0, atol=0)
    hydras = {".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"}
    assert files_below(tmp_path / "whole") == FILES | {"reconstructions.png"} | hydras


def count_rows(file: Path) -> int:
    return len(list(csv.reader(file.open()))) if file.exists() else 0


def test_timed_columns_exist(whole: Any) -> None:
    """The comparison above skips only columns that exist."""
    folder, summary = whole("feature_recon")
    header = next(csv.reader((folder / "metrics.csv").open()))
    assert set(TIMED) < set(header) and set(summary) > OWN_TO_A_PROCESS

"""Resuming a run: by the same command, after damage to checkpoints, and in folders that others use."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from localfeat.run.checkpoints.files import WholeCheckpointIO, newest_sound, read_checkpoint, remove_previous
from localfeat.run.command import run
from localfeat.run.folder import RunFolder
from localfeat.run.resume import difference, earlier_run
from localfeat.utils import locks
from localfeat.utils.errors import RunFailed, Stopped, UserError
from localfeat.utils.locks import is_locked, sole_run, try_lock
from localfeat.utils.text import as_argument
from tests.helpers.command_line import call, said_at_once
from tests.helpers.whole_runs import (
    BATCHES,
    SMALL,
    At,
    checkpoint,
    child_exit,
    composed,
    draw_nothing,
    exported,
    files_below,
    metrics,
    small_run,
    watched_by,
)
from tests.runs.test_run import assert_same_run

QUICK = ["method=greedy_ce", "split=k2", "epochs=2", "callbacks.checkpoint_every_n_batches=1"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        return folder, small_run(folder, *QUICK)


@pytest.fixture(scope="module")
def cut_short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run that was killed in its second epoch: last.ckpt after six batches, previous.ckpt after five."""
    folder = tmp_path_factory.mktemp("cut_short") / "run"

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        watched_by(patch, At("on_train_batch_start", kill, 1, 3))
        assert child_exit(lambda: small_run(folder, *QUICK)) == -signal.SIGKILL
    assert checkpoint(folder)["global_step"] == 6 and checkpoint(folder, "previous")["global_step"] == 5
    return folder


@pytest.fixture
def killed(cut_short: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cut_short, tmp_path / "run"))


def resumed(folder: Path) -> dict[str, Any]:
    return run(composed(f"resume={folder}"), "not used")


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)


DAMAGE: dict[str, Any] = {
    "half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "one bit": lambda file: flip(file, file.stat().st_size // 2),
    "not there": lambda file: file.unlink(),
}


@pytest.mark.parametrize(
    "damage", [pytest.param(d, marks=[] if d in ("one bit", "not there") else pytest.mark.slow) for d in DAMAGE]
)
def test_the_newest_sound_checkpoint_is_used(
    damage: str, killed: Path, whole: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[damage](killed / "checkpoints" / "last.ckpt")
    assert_same_run(killed, resumed(killed), whole)
    said = capsys.readouterr().err
    assert ("warning: " in said and "of batch 5, replaces it" in said) == (damage != "not there")


def test_no_sound_checkpoint_is_refused_and_nothing_is_lost(killed: Path) -> None:
    for name in ("last", "previous"):
        DAMAGE["one bit"](killed / "checkpoints" / f"{name}.ckpt")
    before = {name: (killed / name).read_bytes() for name in files_below(killed) - {".lock"}}
    with pytest.raises(UserError, match=r"last.ckpt cannot be read .*previous.ckpt cannot be read .*to start the run"):
        resumed(killed)
    assert {name: (killed / name).read_bytes() for name in files_below(killed)} == before


def test_every_damage_is_seen_or_harmless(cut_short: Path, tmp_path: Path) -> None:
    """A flipped bit is either refused, or lies between the contents and changes none of them."""
    sound = cut_short / "checkpoints" / "last.ckpt"
    expected, size = read_checkpoint(sound), sound.stat().st_size
    generator, refused = random.Random(0), 0
    for _ in range(60):
        file = tmp_path / "flipped.ckpt"
        shutil.copyfile(sound, file)
        flip(file, generator.randrange(size))
        try:
            found = read_checkpoint(file)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=0)
            torch.testing.assert_close(found["optimizer_states"], expected["optimizer_states"], rtol=0, atol=0)
            assert found["loops"] == expected["loops"]
    assert refused > 40


def test_previous_goes_when_the_run_has_ended(killed: Path) -> None:
    assert (killed / "checkpoints" / "previous.ckpt").exists()
    resumed(killed)
    assert not (killed / "checkpoints" / "previous.ckpt").exists()
    assert newest_sound(RunFolder(killed)) == (killed / "checkpoints" / "last.ckpt", 2 * BATCHES)


def test_previous_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError("no links here")

    seen: list[int] = []
    monkeypatch.setattr(os, "link", refused)
    watched_by(
        monkeypatch,
        At("on_train_batch_start", lambda: seen.append(checkpoint(tmp_path / "run", "previous")["global_step"]), 1, 3),
    )
    small_run(tmp_path / "run", *QUICK)
    assert seen == [5]


def test_a_checkpoint_that_is_its_own_previous_leaves_one_name(tmp_path: Path) -> None:
    """This happens after a failure between the two renames, because renaming a file to itself does nothing."""
    last = tmp_path / "last.ckpt"
    last.write_bytes(b"old")
    os.link(last, tmp_path / "previous.ckpt")
    WholeCheckpointIO().save_checkpoint({"new": 1}, last)
    assert files_below(tmp_path) == {"last.ckpt", "previous.ckpt"}
    assert (tmp_path / "previous.ckpt").read_bytes() == b"old"


def test_a_complete_run_whose_previous_stays_has_not_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints" / "previous.ckpt").mkdir(parents=True)  # unlink refuses a folder
    remove_previous(RunFolder(tmp_path))
    said = capsys.readouterr().err
    assert (
        said.startswith(f"warning: {tmp_path}/checkpoints/previous.ckpt cannot be removed (") and said.count("\n") == 1
    )


def test_figures_that_are_gone_are_told(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint is that of batch 6, counted from 0."""
    (killed / "metrics.csv").unlink()
    resumed(killed)
    assert f"warning: {killed / 'metrics.csv'} is missing: new rows begin after batch 6\n" in capsys.readouterr().err
    assert metrics(killed)[0]["step"] == "6"


@pytest.mark.parametrize("content", [b"", b'{"seed": 0', b"[]", b"\xff\xfe"])
def test_a_damaged_summary_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(UserError, match=r"summary\.json cannot be read"):
        RunFolder(tmp_path).read_summary()


def test_a_checkpoint_of_another_run_is_one_line(killed: Path, whole: Any) -> None:
    """A sound checkpoint that does not fit gives no stack trace."""
    content = checkpoint(killed)
    content["optimizer_states"][0]["param_groups"].pop()
    torch.save(content, killed / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"last.ckpt does not fit this run"):
        resumed(killed)


# --- the beginning of a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment",
    [
        ("on_train_batch_start", 1),
        *(pytest.param(m, marks=pytest.mark.slow) for m in [("on_fit_start", 0), ("on_train_batch_end", 1)]),
    ],
)
def test_killed_before_its_first_checkpoint(
    moment: tuple[str, int], whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts from the beginning in its own folder, as if the folder were empty."""
    folder, (hook, batches) = tmp_path / "run", moment

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        watched_by(patch, At(hook, kill, 0, batches))
        assert child_exit(lambda: small_run(folder, *QUICK)) == -signal.SIGKILL
    assert_same_run(folder, resumed(folder), whole)


def test_a_resumed_run_needs_no_initial_weights(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, or the server it came from, may have gone by now."""
    weights = tmp_path / "weights.safetensors"
    shutil.copyfile(whole[0] / "backbone.safetensors", weights)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        watched_by(patch, At("on_train_batch_start", lambda: os.kill(os.getpid(), signal.SIGTERM), 1, 2))
        small_run(tmp_path / "run", *QUICK, f"backbone.weights={weights}")
    weights.unlink()
    assert resumed(tmp_path / "run")["epochs"] == 2


# --- runs that end before their last epoch ---------------------------------------------------------------------------

ENDS: dict[str, tuple[list[str], tuple[str, int]]] = {
    # overrides that end it early, and where it is killed
    "within an epoch, killed at one's end": (["trainer.max_steps=10"], ("on_train_epoch_start", 2)),
    "within an epoch, killed before the test": (["trainer.max_steps=10"], ("on_test_start", 3)),
    "by early stopping, killed before the test": (
        ["callbacks.early_stopping=1", "optimizer.lr=1e-12"],
        ("on_test_start", 2),
    ),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.slow
def test_a_run_that_ends_early_resumed_ends_there(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides, (hook, epoch) = ENDS[end]
    overrides = [*QUICK, "epochs=3", "callbacks.checkpoint_every_n_batches=null", *overrides]
    expected = tmp_path / "whole", small_run(tmp_path / "whole", *overrides)
    with monkeypatch.context() as patch:
        watched_by(patch, At(hook, _raise, epoch))
        with pytest.raises(RunFailed):
            small_run(tmp_path / "run", *overrides)
    assert_same_run(tmp_path / "run", resumed(tmp_path / "run"), expected)


# --- random numbers --------------------------------------------------------------------------------------------------


class Draws(Callback):
    """A user's callback that draws from every generator at each epoch's start and after validation."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def _draw(self) -> None:
        self.drawn += [random.random(), float(np.random.rand()), random.gauss(0, 1), float(torch.rand(()))]

    def on_train_epoch_start(self, *_: Any) -> None:
        self._draw()

    def on_validation_epoch_end(self, *_: Any) -> None:
        self._draw()


def test_generators_of_all_kinds_are_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uninterrupted, first, second = Draws(), Draws(), Draws()
    with monkeypatch.context() as patch:
        watched_by(patch, uninterrupted)
        small_run(tmp_path / "whole", *QUICK, "callbacks.checkpoint_every_n_batches=null")
    with monkeypatch.context() as patch, pytest.raises(RunFailed):
        watched_by(patch, first, At("on_train_epoch_start", _raise, 1))
        small_run(tmp_path / "run", *QUICK, "callbacks.checkpoint_every_n_batches=null")
    with monkeypatch.context() as patch:
        watched_by(patch, second)
        resumed(tmp_path / "run")
    assert [*first.drawn[:8], *second.drawn] == uninterrupted.drawn and len(second.drawn) == 8


def _raise() -> None:
    raise RunFailed


# --- resume=auto -----------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *more: str, sweep: Sequence[str] = ()) -> int:
    return call(monkeypatch, "run", *sweep, *SMALL, *QUICK, "resume=auto", *more)


def stopping(patch: pytest.MonkeyPatch) -> None:
    watched_by(patch, At("on_train_batch_start", lambda: os.kill(os.getpid(), signal.SIGTERM), 1, 2))


@pytest.mark.parametrize("given", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_same_command_again_resumes(
    given: bool, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The folder is given or found in the output folder; an ended run is left alone."""
    monkeypatch.chdir(tmp_path)
    where = ["hydra.run.dir=mine"] if given else []
    with monkeypatch.context() as patch:
        stopping(patch)
        assert command(patch, *where) == 143
    (folder,) = [file.parent for file in tmp_path.rglob("config.yaml") if file.parent.name != ".hydra"]
    assert command(monkeypatch, *where) == 0
    written = {name: (folder / name).read_bytes() for name in files_below(folder)}
    assert metrics(folder) == metrics(whole[0])
    torch.testing.assert_close(exported(folder), exported(whole[0]), rtol=0, atol=0)
    capfd.readouterr()
    assert command(monkeypatch, *where) == 0
    assert capfd.readouterr().out == (
        "greedy_ce on digits: swin_micro at 16 px\n"
        f"{folder if given else folder.relative_to(tmp_path)}: this run has ended, nothing is left to do "
        "(without resume=auto a new run begins)\n"
    )
    kept = {name: content for name, content in written.items() if not name.startswith(".hydra")}
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert [file.parent for file in tmp_path.rglob("summary.json")] == [folder]
    assert len(list(tmp_path.rglob(".hydra"))) == 1  # no empty folders are left behind


def test_auto_resumes_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another configuration starts a new run, unless only values that change no result differ."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stopping(patch)
        assert command(patch) == 143
    with monkeypatch.context() as patch:
        stopping(patch)
        assert command(patch, "optimizer.weight_decay=0.01") == 143
    assert command(monkeypatch, "callbacks.checkpoint_every_n_epochs=2", "dataset.num_workers=1") == 0
    (ended,) = [file.parent for file in tmp_path.rglob("summary.json")]
    assert OmegaConf.load(ended / "config.yaml").optimizer.weight_decay != 0.01
    assert len(list(tmp_path.rglob("last.ckpt"))) == 2


def test_auto_in_a_folder_of_another_run_is_refused(
    killed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {name: (killed / name).read_bytes() for name in files_below(killed)}
    assert command(monkeypatch, f"hydra.run.dir={killed}", "split=k4") == 2
    assert "holds a run of another configuration (split.modules=2, now split.modules=4)" in capfd.readouterr().err
    assert {name: (killed / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_auto_resumes_every_job_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stopping(patch)
        assert command(patch, "seed=0,1", sweep=["-m"]) == 143
    assert command(monkeypatch, "seed=0,1", sweep=["-m"]) == 0
    ended = [file.parent for file in tmp_path.rglob("summary.json")]
    assert sorted(OmegaConf.load(folder / "config.yaml").seed for folder in ended) == [0, 1]
    assert [len(metrics(folder)) for folder in ended] == [2 * BATCHES + 1, 2 * BATCHES + 1]  # one row for the test


def test_differences_are_named() -> None:
    saved = {"a": {"b": 1, "c": [1, 2.0]}, "split": {"modules": 4}, "output_dir": "x", "logger": {}}
    assert difference(saved, {**saved, "output_dir": "y", "logger": {"project": "p"}}) is None
    assert difference(saved, {**saved, "a": {"b": 1.0, "c": (1, 2)}}) is None
    assert difference(saved, {**saved, "a": {"b": True, "c": [1, 2]}}) == "a.b=1, now a.b=true"
    assert difference(saved, {**saved, "a": {"c": [1, 2]}}) == "a.b=1, now no a.b"
    searched = {"split": {"k": 3}}
    assert difference({"split": {"cuts": [1, 4]}}, searched) is None
    assert difference({"split": {"cuts": [1]}}, searched) is not None
    assert difference({"split": {"cuts": 1}}, searched) is not None


@pytest.mark.parametrize("source", ["cifar10", "image_folder"])
def test_another_folder_of_images_is_another_run(source: str) -> None:
    """The folder of CIFAR-10 does not matter, because its files are the same everywhere."""
    own = source == "image_folder"
    asked = {"dataset": {"source": source, "root": "a", "in_memory": None}, "split": {"modules": 2}}
    for key, value in (("root", "b"), ("in_memory", False)):
        assert (difference({**asked, "dataset": {**asked["dataset"], key: value}}, asked) is not None) == own
    assert difference({**asked, "dataset": {**asked["dataset"], "root": os.path.abspath("a")}}, asked) is None


def test_auto_in_a_folder_of_ones_own_looks_nowhere_else(tmp_path: Path, killed: Path) -> None:
    shutil.copytree(killed, tmp_path / "out" / "day" / "earlier")
    asked = {**RunFolder(killed).read_config(), "output_dir": str(tmp_path / "out")}
    assert earlier(asked, tmp_path / "out" / "day" / "new") == tmp_path / "out" / "day" / "earlier"
    assert earlier(asked, tmp_path / "mine") is None and earlier(asked, killed) == killed


@pytest.mark.slow
def test_auto_knows_a_value_by_another_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``off`` is saved as ``false``."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stopping(patch)
        assert command(patch, "test=off") == 143
    assert command(monkeypatch, "test=off") == 0
    assert len(list(tmp_path.rglob(".hydra"))) == 1


@pytest.mark.parametrize(
    "name", ["a b", "a=b", "a,b", "it's", 'a"b', "größer", "a#b&c;d", "$a`b!", "a\\", "a (b) [c]{d}"]
)
def test_the_command_to_resume_can_be_pasted(name: str) -> None:
    """It survives the shell and Hydra's grammar."""
    folder = Path("/runs") / name
    (typed,) = shlex.split(as_argument("resume", str(folder)))
    found = OverridesParser.create().parse_override(typed)
    assert not found.is_sweep_override() and found.value() == str(folder)


def test_the_newest_of_several_runs(tmp_path: Path, killed: Path) -> None:
    asked = OmegaConf.to_container(OmegaConf.load(killed / "config.yaml"))
    assert isinstance(asked, dict)
    for age, name in enumerate(["new", "old"]):
        folder = shutil.copytree(killed, tmp_path / "out" / "day" / name)
        os.utime(folder / "config.yaml", (1000 - age, 1000 - age))
    (tmp_path / "out" / "day" / "foreign").mkdir()
    (tmp_path / "out" / "day" / "foreign" / "config.yaml").write_text("a: [")
    found = earlier({**asked, "output_dir": str(tmp_path / "out")}, tmp_path / "out" / "day" / "fresh")
    assert found == tmp_path / "out" / "day" / "new"


# --- two runs never share a folder -----------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(killed: Path, tmp_path: Path) -> None:
    before = {name: (killed / name).read_bytes() for name in files_below(killed) if name != ".lock"}
    with sole_run(killed), sole_run(tmp_path / "fresh"):
        with pytest.raises(UserError, match=f"is in use: process {os.getpid()} on .* is training there"):
            resumed(killed)
        with pytest.raises(UserError, match="is in use"):
            small_run(tmp_path / "fresh", *QUICK)
        with pytest.raises(UserError, match="is in use"), sole_run(killed):  # as two that begin at once
            pass
    assert {name: (killed / name).read_bytes() for name in files_below(killed)} == before


def test_in_use_is_said_first_and_nothing_is_written(
    killed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Other messages would tell the user to move the folder away, which would end the other run."""
    before = {name: (killed / name).read_bytes() for name in files_below(killed) - {".lock"}}
    with sole_run(killed):
        for typed in (["resume=auto"], [], ["resume=auto", "split=k4"], ["method=e2e"]):
            arguments = [*SMALL, *QUICK, f"hydra.run.dir={killed}", *typed]
            assert call(monkeypatch, "run", *arguments) == 2
            said = capfd.readouterr()
            assert said_at_once(said.out) and f"{killed} is in use: process {os.getpid()} on" in said.err
    assert {name: (killed / name).read_bytes() for name in files_below(killed)} == before


def test_a_refused_command_leaves_the_notes_of_the_run_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*SMALL, *QUICK, f"hydra.run.dir={tmp_path}/run"]
    assert call(monkeypatch, "run", *arguments) == 0
    before = {name: (tmp_path / "run" / name).read_bytes() for name in files_below(tmp_path / "run")}
    assert {f".hydra/{name}.yaml" for name in ("config", "overrides", "hydra")} < before.keys()
    assert call(monkeypatch, "run", *arguments, "seed=7") == 2
    assert {name: (tmp_path / "run" / name).read_bytes() for name in files_below(tmp_path / "run")} == before


def test_a_run_holds_its_lock_until_its_end_and_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    lock = tmp_path / "run" / ".lock"
    watched_by(monkeypatch, At("on_test_start", lambda: seen.append(is_locked(lock)), 2))
    small_run(tmp_path / "run", *QUICK)
    assert seen == [True] and not lock.exists()


def test_a_lock_that_was_removed_meanwhile_counts_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that opened the lock file before its holder removed it would lock a file that others cannot see."""
    file = tmp_path / ".lock"
    flock, removed = locks.fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not removed:
            removed.append(file.unlink())
        flock(descriptor, how)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    descriptor = try_lock(file)
    assert descriptor is not None and file.exists() and is_locked(file)
    os.close(descriptor)


def test_without_locks_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: Any) -> None:
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with sole_run(tmp_path):
        pass
    assert "no locks on this file system" in capsys.readouterr().err


def earlier(asked: dict[str, Any], folder: Path) -> Path | None:
    found = earlier_run(asked, RunFolder(folder))
    return None if found is None else found.path

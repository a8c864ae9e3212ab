"""A whole run in W&B: its offline file holds the same values as the run's own files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import Callback
from PIL import Image

from localfeat.run import train as training
from localfeat.run.callbacks.peak_memory import GIB
from localfeat.run.command import run
from localfeat.run.folder import RunFolder
from localfeat.run.loggers.metrics_csv import read_rows
from localfeat.run.loggers.wandb_logger import AXIS, wandb_logger
from localfeat.run.loggers.wandb_service import finish
from localfeat.utils.errors import UserError
from tests.helpers.wandb_account import without_login
from tests.helpers.wandb_server import serving
from tests.helpers.whole_runs import BATCHES, TIMED, checkpoint, composed, exported, metrics, small_run
from tests.unit.run.test_wandb_logger import records

WANDB = ["logger=wandb", "logger.group=study", "logger.name=job", "logger.tags=[mine,digits]"]


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Path:
    """Make a run that logs everything it can to W&B."""
    without_login(tmp_path_factory.mktemp("home"), patch)
    folder = tmp_path_factory.mktemp("runs") / "told"
    small_run(folder, *WANDB, "logger.reconstructions_every_n_epochs=2")
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Make the same run without W&B."""
    with pytest.MonkeyPatch.context() as pictures:
        draw_little(pictures)
        small_run(folder.parent / "plain")
    return folder.parent / "plain"


def draw_little(patch: pytest.MonkeyPatch) -> None:
    """Draw pictures of one pixel, because real ones take most of a small run's time."""
    for name in ("learning_curves", "reconstruction_grid"):
        patch.setattr(training, name, lambda *arguments, **_: Image.new("RGB", (1, 1)).save(arguments[-1]))


def parts(folder: Path) -> list[dict[str, Any]]:
    """Return W&B's records of the run in ``folder``, one for each start, in order of time."""
    return [part(path) for path in sorted((folder / "wandb").glob("offline-run-*"), key=lambda p: p.stat().st_ctime)]


def part(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "metrics": {}, "files": path / "files"}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
        for item in [*record.run.config.update, *record.config.update]:
            found["config"][item.key] = json.loads(item.value_json)
        found["summary"] |= flat(record.summary.update)
        if kind == "history":
            found["history"].append(flat(record.history.item))
        if kind == "metric":
            found["metrics"][record.metric.name or record.metric.glob_name] = record.metric
    return found


def flat(items: Iterable[Any]) -> dict[str, Any]:
    """Return name -> value, with nested names joined by dots."""
    found: dict[str, Any] = {}
    for item in items:
        name, value = ".".join(item.nested_key) or item.key, json.loads(item.value_json)
        found |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return found


def numbers(history: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Return step -> the values that metrics.csv has a column for."""
    own = {AXIS, "_step", "_runtime", "_timestamp"}
    return {row["_step"]: {k: v for k, v in row.items() if k not in own and "." not in k} for row in history}


def logged(folder: Path) -> dict[int, dict[str, float]]:
    return {
        int(row["step"]): {name: float(value) for name, value in row.items() if value and name != "step"}
        for row in read_rows(folder / "metrics.csv")
    }


def test_history_is_metrics_csv(folder: Path) -> None:
    (told,) = parts(folder)
    rows = told["history"]
    assert [row["_step"] for row in rows] == [row[AXIS] for row in rows] == list(range(3 * BATCHES + 1))
    history, csv = numbers(rows), logged(folder)
    assert history.keys() == csv.keys()
    for step, values in csv.items():
        assert history[step] == pytest.approx(values), step


def test_every_metric_is_drawn_against_batches(folder: Path) -> None:
    (told,) = parts(folder)
    metrics = told["metrics"]
    for name in {name for row in logged(folder).values() for name in row} - {"epoch"}:
        family = name.partition("/")[0]
        for defined in {name, f"{family}/*"} & metrics.keys():
            assert metrics[defined].step_metric == AXIS, name
        assert f"{family}/*" in metrics, name
    assert metrics["val/accuracy"].summary.max and metrics["val/accuracy"].summary.last
    assert metrics["val/loss"].summary.min


def test_configuration_is_complete(folder: Path) -> None:
    (told,) = parts(folder)
    config, summary = told["config"], json.loads((folder / "summary.json").read_text())
    for name, value in RunFolder(folder).read_config().items():
        assert config[name] == json.loads(json.dumps(value)), name
    assert config["network"] == {
        "model": summary["backbone"],
        "modules": 4,
        "blocks_per_module": summary["split"],
        "parameters": summary["parameters"],
    }
    same = ("versions", "hardware", "command")
    assert {name: config["environment"][name] for name in same} == {name: summary[name] for name in same}
    assert "commit" in config["environment"], "when the run began: summary.json has that of its end"


def test_run_is_found_by_study_name_and_tags(folder: Path) -> None:
    (told,) = parts(folder)
    found = told["run"]
    assert (found.display_name, found.run_group, found.job_type, found.project) == (
        "job",
        "study",
        "train",
        "localfeat",
    )
    assert list(found.tags) == ["mine", "digits", "feature_recon", "swin_micro", "k4"]
    assert found.run_id == (folder / "wandb" / "run_id").read_text().strip()


def test_summary_is_summary_json(folder: Path) -> None:
    (told,) = parts(folder)
    summary, found = json.loads((folder / "summary.json").read_text()), told["summary"]
    for name, value in summary.items():
        if value is None or isinstance(value, dict):
            continue
        assert found[name] == value, name
    assert found["module_losses.module_1/loss"] == summary["module_losses"]["module_1/loss"]
    accuracies = [row["val/accuracy"] for row in logged(folder).values() if "val/accuracy" in row]
    assert found["val/accuracy.max"] == pytest.approx(max(accuracies)) == pytest.approx(summary["val_accuracy"])
    assert found["val/accuracy.last"] == pytest.approx(accuracies[-1])


def table(told: dict[str, Any], name: str) -> list[dict[str, Any]]:
    (row,) = [row for row in told["history"] if f"{name}.path" in row]
    content = json.loads((told["files"] / row[f"{name}.path"]).read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def test_tables_say_what_summary_json_says(folder: Path) -> None:
    (told,) = parts(folder)
    summary = json.loads((folder / "summary.json").read_text())
    modules = table(told, "modules")
    assert [(row["first_block"], row["last_block"]) for row in modules] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    for number, row in enumerate(modules, start=1):
        name = f"module_{number}"
        assert (row["module"], row["parameters"]) == (number, summary["parameters"][name])
        assert row["peak_memory_gib"] * GIB == pytest.approx(summary["module_peak_memory_bytes"][name])
        terms = {k.partition("/")[2]: v for k, v in summary["module_losses"].items() if k.startswith(f"{name}/")}
        assert {term: row[term] for term in ("loss", "contrast", "reconstruction", "cross_entropy")} == {
            "contrast": None, "reconstruction": None, "cross_entropy": None, **terms
        }  # fmt: skip
    (results,) = table(told, "results")
    same = set(results) - {"modules", "peak_memory_gib", "parameters_backbone", "parameters_auxiliary"}
    assert {name: results[name] for name in same} == {name: summary[name] for name in same}
    assert {"method", "seed", "test_accuracy", "images_per_second"} <= same
    assert (results["modules"], results["parameters_auxiliary"]) == (4, summary["parameters"]["auxiliary"])
    assert results["peak_memory_gib"] * GIB == pytest.approx(summary["peak_memory_bytes"])


def test_pictures_are_there_with_captions(folder: Path) -> None:
    (told,) = parts(folder)
    for module in (1, 2, 3):
        name = f"reconstructions/module_{module}"
        rows = [row for row in told["history"] if f"{name}.path" in row]
        assert [row[AXIS] for row in rows] == [2 * BATCHES - 1, 3 * BATCHES], "after the second epoch, and at the end"
        for row in rows:
            low, high = Image.open(told["files"] / row[f"{name}.path"]).convert("L").getextrema()
            assert high - low > 50, "something is to be seen"
            assert f"module {module} reconstructs its input features" in row[f"{name}.caption"]
    for name in ("learning_curves", "reconstructions"):
        (row,) = [row for row in told["history"] if f"{name}.filenames" in row]
        (file,) = row[f"{name}.filenames"]
        assert (told["files"] / file).read_bytes() == (folder / f"{name}.png").read_bytes()


def test_a_run_is_the_same_without(folder: Path, plain: Path) -> None:
    assert metrics(folder) == metrics(plain)
    weights, others = exported(folder), exported(plain)
    assert all(torch.equal(weights[name], others[name]) for name in weights | others)
    assert not (plain / "wandb").exists()


class Ends(Callback):
    """Calls ``action`` at the beginning of a batch (from 0) of the second epoch."""

    def __init__(self, batch: int, action: Any) -> None:
        self.batch, self.action = batch, action

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == BATCHES + self.batch:
            self.action()


def during_the_second_epoch(patch: pytest.MonkeyPatch, action: Any) -> None:
    build = training.build_callbacks
    patch.setattr(training, "build_callbacks", lambda *a, **k: [Ends(2, action), *build(*a, **k)])


class PowerCutError(Exception):
    pass


def power_cut() -> None:
    raise PowerCutError


@pytest.mark.slow
def test_a_resumed_run_keeps_its_id(folder: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_little(monkeypatch)
    with monkeypatch.context() as cut:
        during_the_second_epoch(cut, power_cut)
        with pytest.raises(PowerCutError):
            small_run(tmp_path / "cut", *WANDB)
    assert checkpoint(tmp_path / "cut")["global_step"] == BATCHES
    run(composed(f"resume={tmp_path / 'cut'}"), tmp_path)
    first, second = parts(tmp_path / "cut")
    assert first["run"].run_id == second["run"].run_id == (tmp_path / "cut" / "wandb" / "run_id").read_text().strip()
    assert (second["run"].display_name, second["run"].run_group) == ("job", "study")
    assert [row["_step"] for row in first["history"]] == list(range(BATCHES + 2)), "up to the cut"
    assert [row["_step"] for row in second["history"]] == list(range(BATCHES, 3 * BATCHES + 1))
    together = numbers(first["history"]) | numbers(second["history"])
    wanted = logged(tmp_path / "cut")
    assert together.keys() == wanted.keys()
    assert all(together[step] == pytest.approx(wanted[step]) for step in wanted)
    assert metrics(tmp_path / "cut") == metrics(plain)


@pytest.mark.slow
def test_online_a_resumed_run_keeps_its_id(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    draw_little(monkeypatch)
    with serving() as (server, address):
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", address)
        with monkeypatch.context() as cut:
            during_the_second_epoch(cut, power_cut)
            with pytest.raises(PowerCutError):
                small_run(tmp_path / "cut", *WANDB)
        (sent,) = server.rows.values()
        assert [row["_step"] for row in sent] == list(range(BATCHES + 2)), "two batches behind the checkpoint"
        run(composed(f"resume={tmp_path / 'cut'}"), tmp_path)
    assert "warning: W&B" not in capfd.readouterr().err
    (run_id,) = server.rows
    assert run_id == (tmp_path / "cut" / "wandb" / "run_id").read_text().strip()
    rows, wanted = server.rows[run_id], logged(tmp_path / "cut")
    assert [row["_step"] for row in rows] == [row[AXIS] for row in rows] == list(wanted), "none twice, none left out"
    for row in rows:
        untimed = {k: v for k, v in wanted[row["_step"]].items() if k not in TIMED}
        assert {name: row[name] for name in untimed} == pytest.approx(untimed)
    assert "results.path" in rows[-1] or rows[-1]["results"]["nrows"] == 1
    assert metrics(tmp_path / "cut") == metrics(plain)


class Online:
    """A stand-in for a run of which W&B's server has six steps."""

    starting_step = 6

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append((step, row))


def test_steps_that_the_server_has_are_not_sent_again(folder: Path, tmp_path: Path) -> None:
    logger, online = wandb_logger("study", save_dir=tmp_path), Online()
    logger.attempt = lambda action: action(online)  # type: ignore[method-assign]
    for step in (4, 5):
        logger.log_metrics({"val/loss": 1.0}, step)
    logger.log_metrics({"pictures": 1.0})
    logger.log_metrics({"val/loss": 2.0}, 7)
    logger.log_metrics({"tables": 1.0})
    assert [(step, *row) for step, row in online.rows] == [
        (6, "pictures", AXIS), (7, "val/loss", AXIS), (7, "tables", AXIS)
    ]  # fmt: skip
    assert all(row[AXIS] == step for step, row in online.rows)


def test_a_new_run_in_the_same_folder_is_another_one(folder: Path, tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        logger = wandb_logger("study", save_dir=tmp_path)
        logger.begin(tmp_path, resume=False)
        ids.append((tmp_path / "wandb" / "run_id").read_text())
        finish()
    assert len(set(ids)) == 2


def kill_service() -> None:
    """Kill W&B's service, a child of this process, with SIGKILL."""
    children = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True, check=True
    ).stdout
    (pid,) = [int(line.split()[0]) for line in children.splitlines() if "wandb-core" in line]
    os.kill(pid, signal.SIGKILL)


def test_training_continues_when_wandb_dies(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    draw_little(monkeypatch)
    with monkeypatch.context() as died:
        during_the_second_epoch(died, kill_service)
        small_run(tmp_path / "died", *WANDB)
    assert metrics(tmp_path / "died") == metrics(plain)
    assert (tmp_path / "died" / "summary.json").is_file()
    said = capfd.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in said] == [
        "warning: W&B has failed",
        "warning: W&B has not finished properly",
    ]
    assert wandb.run is None and "WANDB_SERVICE" not in os.environ
    logger = wandb_logger("study", save_dir=tmp_path)
    logger.log_metrics({"val/loss": 1.0}, 0)
    assert not logger.lost, "the next job has a run of its own"
    finish()


def test_without_a_connection_a_run_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    without_login(tmp_path / "home", monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # no server there
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    logger = wandb_logger("study", save_dir=tmp_path)
    logger.begin(tmp_path, resume=False)
    logger.log_metrics({"val/loss": 1.0}, 7)
    finish()
    assert "warning: W&B cannot be reached" in capfd.readouterr().err
    (told,) = parts(tmp_path)
    assert [row["val/loss"] for row in told["history"]] == [1.0]
    insisting = wandb_logger("study", save_dir=tmp_path, mode="online")
    with pytest.raises(UserError, match=r"^W&B cannot be reached \(.*\): logger.mode=auto would log offline$"):
        insisting.begin(tmp_path, resume=False)
    finish()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"project": "a/b"}, "Invalid project name 'a/b'"), ({"tags": ["t" * 80]}, "run_tags: Value error, Tag 'ttt")],
)
def test_what_wandb_refuses_is_one_line(folder: Path, tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        wandb_logger(**{"project": "study", "save_dir": tmp_path, **wrong}).begin(tmp_path, resume=False)
    assert "\n" not in str(refused.value)
    finish()


def test_pictures_every_zero_epochs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reconstructions_every_n_epochs=0: it must be at least 1"):
        wandb_logger("study", save_dir=tmp_path, reconstructions_every_n_epochs=0)

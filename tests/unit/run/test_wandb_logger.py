"""W&B offline: one readable run per job, a clean environment afterwards, no prompts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from matplotlib.image import imsave

from localfeat.run.loggers.wandb_logger import has_login, log_images, resolve_mode, wandb_logger
from localfeat.run.loggers.wandb_service import finish
from localfeat.utils.errors import UserError
from tests.helpers.tiny import TinyLearner, loader, trainer
from tests.helpers.wandb_account import without_login


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_login(tmp_path / "home", monkeypatch)


def test_login_is_found_where_wandb_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_login()
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    netrc.write_text("machine example.org\n login user\n password x\n")
    netrc.chmod(0o600)
    assert not has_login()
    netrc.write_text("machine api.wandb.ai\n login user\n password x\n")
    assert has_login()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert not has_login()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert has_login()


def test_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [resolve_mode(mode) for mode in ("auto", "offline", "disabled")] == ["offline", "offline", "disabled"]
    with pytest.raises(UserError, match="without a login"):
        resolve_mode("online")
    with pytest.raises(UserError, match="unknown W&B mode 'on'"):
        resolve_mode("on")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") is None, "left to the variable"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert resolve_mode("auto") == "offline", "online without a login would ask for one"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert resolve_mode("auto") == resolve_mode("online") == "online"


LEVELDB_BLOCK = 32768


def records(folder: Path) -> Iterator[Any]:
    """Yield the protobuf records of an offline run: LevelDB's log format after a 7-byte file header."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("run-*.wandb")
    data, position, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if LEVELDB_BLOCK - position % LEVELDB_BLOCK < 7:
            position += LEVELDB_BLOCK - position % LEVELDB_BLOCK
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_run(folder: Path) -> dict[str, Any]:
    """Return name, group, tags, configuration keys and history of an offline run."""
    found: dict[str, Any] = {"config": {}, "history": [], "x_axis": {}}
    for record in records(folder):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"name": record.run.display_name, "group": record.run.run_group, "tags": list(record.run.tags)}
            found |= {"project": record.run.project, "job_type": record.run.job_type}
        for item in [*record.run.config.update, *record.config.update]:
            found["config"][item.key or ".".join(item.nested_key)] = item.value_json
        if kind == "history":
            row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            found["history"].append(row)
        if kind == "metric":
            found["x_axis"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
    return found


def job(folder: Path, name: str) -> None:
    logger = wandb_logger("study", group="g", name=name, tags=["a", "b"], job_type="train", save_dir=folder)
    try:
        logger.log_hyperparams({"method": name})
        trainer(folder, logger=logger, max_epochs=2).fit(TinyLearner(), loader(3), loader(1))
        imsave(folder / "grid.png", [[[0.0, 0.5, 1.0]]])
        log_images(logger, {"reconstructions": folder / "grid.png"})
    finally:
        finish()


def test_two_jobs_in_one_process_are_two_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # a prompt would fail
    before = dict(os.environ)
    for name in ("one", "two"):
        job(tmp_path / name, name)
    assert dict(os.environ) == before
    assert wandb.run is None
    for name in ("one", "two"):
        (folder,) = (tmp_path / name / "wandb").glob("offline-run-*")
        run = read_run(folder)
        assert (run["name"], run["group"], run["tags"]) == (name, "g", ["a", "b"])
        assert (run["project"], run["job_type"]) == ("study", "train")
        assert run["config"]["method"] == f'"{name}"'
        steps = [int(row["trainer/global_step"]) for row in run["history"] if "train/loss" in row]
        assert steps == list(range(6))
        assert sum("val/accuracy" in row for row in run["history"]) == 2
        assert sum("reconstructions" in str(row) for row in run["history"]) == 1
        assert run["x_axis"]["*"] == "trainer/global_step"
        assert list(folder.glob("files/media/images/*.png"))
    assert "wandb:" not in "".join(capfd.readouterr()), "the terminal stays tidy"


def test_finish_without_a_run_does_nothing() -> None:
    finish()

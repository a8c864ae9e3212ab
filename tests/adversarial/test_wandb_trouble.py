"""W&B in trouble: the training goes on or does not begin, one line says why, and the process ends soon."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from localfeat.run.loggers import wandb_logger as module
from localfeat.run.loggers import wandb_service
from localfeat.run.loggers.deadline import within
from localfeat.run.loggers.wandb_logger import RunLogger, wandb_logger
from localfeat.run.loggers.wandb_service import finish
from localfeat.utils.errors import UserError
from tests.helpers.small_disk import fill, small_disk
from tests.helpers.wandb_account import without_login
from tests.helpers.wandb_server import Server, serving
from tests.unit.run.test_wandb_logger import records


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    without_login(tmp_path / "home", monkeypatch)
    yield
    finish()
    assert wandb.run is None and "WANDB_SERVICE" not in os.environ
    assert services() == []


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving() as (server, address):
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", address)
        yield server


def services() -> list[int]:
    """W&B's services that are children of this process."""
    command = ["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="]
    children = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in children.splitlines() if "wandb-core" in line]


def begun(folder: Path, mode: str = "auto") -> RunLogger:
    logger = wandb_logger("study", save_dir=folder, mode=mode)
    logger.begin(folder, resume=False)
    logger.log_metrics({"val/loss": 1.0}, 0)
    return logger


def seconds_to_finish(exit_code: int = 0) -> float:
    start = time.perf_counter()
    finish(exit_code)
    return time.perf_counter() - start


def warned(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What was said on stderr, without the reasons."""
    return [line.partition(" (")[0] for line in capfd.readouterr().err.splitlines()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_service_that_dies_or_hangs_does_not_keep_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "0.2")
    begun(tmp_path)
    os.kill(*services(), number)
    assert seconds_to_finish() < 6
    assert warned(capfd) == ["warning: W&B has not finished properly"]
    assert services() == []


def test_a_service_that_hangs_during_training_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LONGEST_CALL", 0.5)
    logger = begun(tmp_path)
    os.kill(*services(), signal.SIGSTOP)
    for step in range(1, 5000):  # until its pipe is full
        logger.log_metrics({f"module_{number}": 1.0 for number in range(100)}, step)
        if logger.lost:
            break
    assert logger.lost and services() == []
    logger.log_metrics({"val/loss": 1.0}, 5000)
    assert seconds_to_finish() < 1
    assert warned(capfd) == ["warning: W&B has failed"]


def test_an_outage_during_training(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    logger = begun(tmp_path)
    server.refuses = 500
    logger.log_metrics({"val/loss": 2.0}, 1)
    assert seconds_to_finish() < 6
    assert warned(capfd) == ["warning: W&B has not finished properly"]
    (folder,) = (tmp_path / "wandb").glob("run-*")
    losses = [
        float(item.value_json) for record in records(folder) for item in record.history.item if "val/loss" in str(item)
    ]
    assert losses == [1.0, 2.0], "all is on the disk for wandb sync"


def test_a_key_that_is_refused(tmp_path: Path, server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    server.refuses = 401
    with pytest.raises(UserError, match=r"^W&B cannot be reached \(.*401.*\): logger.mode=auto goes on offline$"):
        begun(tmp_path / "insists", "online")
    logger = begun(tmp_path / "auto")
    assert not logger.lost and logger.experiment.offline
    finish()
    assert warned(capfd) == ["warning: W&B cannot be reached"]


def test_a_key_that_is_none(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(
        UserError, match=r"^W&B cannot be reached \(WANDB_API_KEY invalid: .*\): logger.mode=auto"
    ) as no:
        begun(tmp_path, "online")
    assert "\n" not in str(no.value)


def test_a_full_disk_stops_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "wandb", 256) as disk:
        logger = begun(tmp_path)
        fill(disk)
        for step in range(1, 500):
            logger.log_metrics({f"module_{number}": 1.0 for number in range(100)}, step)
        assert seconds_to_finish() < 13
    assert [line.partition(" of ")[0] for line in warned(capfd)] == ["warning: W&B has not written all"]


@pytest.mark.parametrize("mode", ["offline", "auto"])
def test_a_full_disk_at_the_start_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], mode: str
) -> None:
    with small_disk(tmp_path / "wandb", 64) as disk:
        fill(disk)
        begun(tmp_path, mode).log_metrics({"val/loss": 1.0}, 1)
        assert seconds_to_finish() < 13
    assert {line[:12] for line in warned(capfd)} == {"warning: W&B"}


def test_neither_online_nor_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no service")

    with monkeypatch.context() as broken:
        broken.setattr(wandb, "init", fail)
        logger = begun(tmp_path)
        assert logger.lost
        with pytest.raises(UserError, match=r"^W&B cannot be reached \(no service\)"):
            broken.setenv("WANDB_API_KEY", "x" * 40)
            begun(tmp_path, "online")
    assert warned(capfd) == ["warning: W&B cannot be reached", "warning: W&B does not start offline either"]
    assert not begun(tmp_path / "next").lost, "the next job starts afresh"


@pytest.mark.parametrize(("exit_code", "preempted"), [(0, False), (1, False), (130, False), (143, True)])
def test_wandb_is_told_how_the_run_ended(tmp_path: Path, exit_code: int, preempted: bool) -> None:
    begun(tmp_path)
    finish(exit_code)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    found = list(records(folder))
    assert [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"] == [exit_code]
    assert any(r.WhichOneof("record_type") == "preempting" for r in found) == preempted


@pytest.mark.parametrize("rows", [0, 700])
def test_a_whole_record_of_a_run_is_told_from_a_cut_one(tmp_path: Path, rows: int) -> None:
    logger = begun(tmp_path)
    for step in range(1, rows):
        logger.log_metrics({f"module_{number}": 1.0 for number in range(5)}, step)
    finish()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert wandb_service.is_complete(file)
    content = file.read_bytes()
    for size in (0, 1, 7, 20, len(content) // 2, len(content) - 200):
        file.write_bytes(content[:size])
        assert not wandb_service.is_complete(file), size


def test_a_time_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "soon")
    with pytest.raises(UserError, match=r"^WANDB_FINISH_TIMEOUT=soon: it must be a number of seconds$"):
        wandb_logger("study", save_dir=tmp_path)


@pytest.mark.parametrize("content", ["", "\n", "\x00\xff"])
def test_a_kept_id_that_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run_id").write_bytes(content.encode("latin1"))
    assert module._run_id(tmp_path / "wandb" / "run_id") == ""


def test_within() -> None:
    assert within(5, lambda: 3) == within(None, lambda: 3) == 3
    with pytest.raises(KeyError, match="x"):
        within(5, lambda: {}["x"])
    with pytest.raises(SystemExit):
        within(5, lambda: exit(3))
    release = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0.01 s"):
        within(0.01, release.wait)
    release.set()


def test_threads_of_others_still_say_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda found: said.append(found.thread.name))
    wandb_service.quietly(lambda: None)
    for name in ("NetStatThr", "own"):
        thread = threading.Thread(target=lambda: 1 / 0, name=name)
        thread.start()
        thread.join()
    assert said == ["own"]

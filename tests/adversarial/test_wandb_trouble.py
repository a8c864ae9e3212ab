"""W&B failures: the training continues or does not start, one line says why, and the process ends soon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from localfeat.run.loggers import wandb_logger as module
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
    """Return the process ids of W&B's services that are living children of this process."""
    command = ["ps", "--ppid", str(os.getpid()), "-o", "pid=,stat=,comm="]
    children = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [line.split() for line in children.splitlines() if "wandb-core" in line]
    return [int(pid) for pid, state, *_ in found if not state.startswith("Z")]


def end_once_they_can() -> bool:
    """Return whether services that were suspended and dropped end by themselves once they are continued."""
    for pid in services():
        os.kill(pid, signal.SIGCONT)
    end = time.monotonic() + 20
    while services() and time.monotonic() < end:
        time.sleep(0.1)
    return not services()


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
    """Return the warnings on stderr, without their reasons."""
    return [line.partition(" (")[0] for line in capfd.readouterr().err.splitlines()]


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_service_that_dies_or_hangs_does_not_keep_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "0.2")
    begun(tmp_path)
    os.kill(*services(), number)
    assert seconds_to_finish() < 6
    assert warned(capfd) == ["warning: W&B has not finished properly"]
    assert wandb.run is None and "WANDB_SERVICE" not in os.environ
    assert end_once_they_can()


@pytest.mark.slow
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
    assert logger.lost and wandb.run is None and "WANDB_SERVICE" not in os.environ
    logger.log_metrics({"val/loss": 1.0}, 5000)
    assert seconds_to_finish() < 1
    assert warned(capfd) == ["warning: W&B has failed"]
    assert end_once_they_can()


HANGS = """
import os, signal, subprocess, sys
from pathlib import Path
from localfeat.run.loggers.wandb_logger import wandb_logger
from localfeat.run.loggers.wandb_service import finish

logger = wandb_logger("study", save_dir=sys.argv[1])
logger.begin(Path(sys.argv[1]), resume=False)
children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True).stdout
(pid,) = [int(line.split()[0]) for line in children.splitlines() if "wandb-core" in line]
os.kill(pid, signal.SIGSTOP)
finish()
Path(sys.argv[1], "service").write_text(str(pid))
"""


@pytest.mark.slow
def test_a_process_ends_although_its_service_hangs(tmp_path: Path) -> None:
    environment = {**os.environ, "WANDB_FINISH_TIMEOUT": "0.2", "PYTHONPATH": str(Path(__file__).parents[2])}
    with open(tmp_path / "out", "wb") as out:  # a file, because the service would hold a pipe open
        command = [sys.executable, "-c", HANGS, str(tmp_path)]
        ended = subprocess.run(command, env=environment, stdout=out, stderr=out, timeout=60, check=False)
    os.kill(int((tmp_path / "service").read_text()), signal.SIGCONT)
    assert ended.returncode == 0, (tmp_path / "out").read_text()


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
    with pytest.raises(UserError, match=r"^W&B cannot be reached \(.*401.*\): logger.mode=auto would log offline$"):
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
    assert warned(capfd) == []


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

"""W&B's service process: how to end it in bounded time, and keep it and wandb's threads quiet."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from localfeat.run.loggers.deadline import NoAnswerError, within
from localfeat.utils.errors import UserError

LONGEST_END = 10.0  # seconds in which a run may send what is left, see ``finish``
LONGEST_TEARDOWN = 5.0  # seconds more, in which its service writes what it has to the disk
PREEMPTED = (128 + signal.SIGTERM, 128 + signal.SIGUSR1)  # exit codes: what batch systems send
BLOCK, HEADER = 32768, 7  # bytes, of wandb's file of records
WANDBS_THREADS = ("NetStatThr", "ChkStopThr", "IntMsgThr")  # they ask the service something every few seconds

_T = TypeVar("_T")


def line_of(error: BaseException) -> str:
    """What an error says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def warn(line: str) -> None:
    """Say on stderr what does not stop the training."""
    print(f"warning: {line}", file=sys.stderr)


def quietly(start: Callable[[], _T]) -> _T:
    """What ``start()`` returns, which begins a run of wandb's: its messages and stack traces never reach the terminal.

    wandb's threads die loudly with its service, and its log file prints a stack trace for every line that a full disk
    does not take.
    """
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    if not isinstance(threading.excepthook, _WithoutWandb):
        threading.excepthook = _WithoutWandb(threading.excepthook)
    loud, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        return start()
    finally:
        logging.raiseExceptions = loud
        for handler in logging.getLogger("wandb").handlers:
            handler.handleError = lambda record: None  # type: ignore[method-assign]


class _WithoutWandb:
    """A ``threading.excepthook`` that leaves out wandb's threads."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def __call__(self, found: Any) -> None:
        if found.thread is None or found.thread.name not in WANDBS_THREADS:
            self.hook(found)


def seconds(variable: str, otherwise: float) -> float:
    """A time from the environment.

    Raises:
        UserError: it is no number.
    """
    text = os.environ.get(variable) or str(otherwise)
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{variable}={text}: it must be a number of seconds") from error


def finish(exit_code: int = 0) -> None:
    """Closes the run of this process, if there is one, so that the next job gets its own.

    Also stops wandb's service process, which leaves WANDB_SERVICE in the environment as long as it runs.

    What has not been sent after 10 s, or as many as WANDB_FINISH_TIMEOUT says (0: wait as long as it takes), stays on
    the disk for ``wandb sync``. A service that does not answer is killed soon after.

    Args:
        exit_code: of the process; W&B then calls the run finished (0), failed, or preempted (128 + SIGTERM, SIGUSR1).
    """
    import wandb

    run, file, service = wandb.run, None, _service()
    if run is not None:
        limit = seconds("WANDB_FINISH_TIMEOUT", LONGEST_END)
        file = None if run.disabled else Path(run.settings.sync_file)
        try:
            within(limit + 2 if limit else None, partial(_end, run, exit_code))
        except (Exception, SystemExit) as error:
            warn(f"W&B has not finished properly ({line_of(error)}): wandb sync <folder of the run in wandb/> sends it")
            if isinstance(error, NoAnswerError):
                abandon()
                return
            file = None
    try:
        within(LONGEST_TEARDOWN, partial(wandb.teardown, exit_code))  # it writes what it has before it ends
    except (Exception, SystemExit) as error:
        abandon(service)  # or the run would be the next job's, too
        if run is None or file is not None:
            warn(f"W&B's service has not ended properly ({line_of(error)})")
        return
    if file is not None and not is_complete(file):  # only now the service has closed it
        warn(f"W&B has not written all of {file}: was the disk full? The run's own files have everything")


def _end(run: Any, exit_code: int) -> None:
    if exit_code in PREEMPTED:
        run.mark_preempting()
    run.finish(exit_code)  # no ``quiet``: a TypeError in wandb 0.31


def is_complete(file: Path) -> bool:
    """Whether W&B's record of a run has its end: the service says nothing when a full disk does not take it.

    Records stand in blocks of 32 KiB, each behind a checksum (4 bytes), a length (2) and a kind (1); the first block
    begins with 7 bytes of its own. The last two blocks are read.
    """
    from wandb.proto import wandb_internal_pb2

    protocol: Any = wandb_internal_pb2
    if not file.is_file():
        return False
    with file.open("rb") as content:
        start = max(0, (file.stat().st_size - 1) // BLOCK - 1) * BLOCK
        content.seek(start)
        data = content.read()
    position, kinds = (0 if start else HEADER), []
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # too little for another record
            position += BLOCK - position % BLOCK
            continue
        length, whole = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6] == 1
        record = data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if whole and len(record) == length:
            with suppress(Exception):  # protobuf's own; a damaged record is not the end
                kinds.append(protocol.Record.FromString(record).WhichOneof("record_type"))
    return "exit" in kinds


def _service() -> subprocess.Popen[bytes] | None:
    """The process of W&B's service, if this one has started it."""
    from wandb.sdk import wandb_setup

    connection = getattr(wandb_setup._singleton, "_connection", None)
    return getattr(getattr(connection, "_proc", None), "_process", None)


def abandon(service: subprocess.Popen[bytes] | None = None) -> None:
    """Forget W&B's run and its service, without waiting: it has died, hangs, or has nobody to talk to.

    Args:
        service: wandb itself may have forgotten it.
    """
    import wandb
    from wandb.sdk.lib.module import unset_globals

    service = service or _service()
    if service is not None:
        service.kill()
        service.wait()
    with suppress(Exception, SystemExit):
        within(2.0, partial(wandb.teardown, 1))
    unset_globals()

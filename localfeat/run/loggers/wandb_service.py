"""Close W&B's run and its service process, in bounded time and by W&B's public calls."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from functools import partial
from typing import Any

from localfeat.run.loggers.deadline import within
from localfeat.utils.errors import UserError

LONGEST_END = 10.0  # seconds for a run to upload the rest, see ``finish``
LONGEST_TEARDOWN = 5.0  # further seconds for its service to write its data to the disk
SHORT_TEARDOWN = 2.0  # seconds for a service that did not answer before
PREEMPTED = (128 + signal.SIGTERM, 128 + signal.SIGUSR1)  # exit codes after the signals of batch systems


def line_of(error: BaseException) -> str:
    """Return the first line of an error's message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def warn(line: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {line}", file=sys.stderr)


def seconds(variable: str, otherwise: float) -> float:
    """Return a number of seconds from the environment.

    Raises:
        UserError: the variable is not a number.
    """
    text = os.environ.get(variable) or str(otherwise)
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{variable}={text}: it must be a number of seconds") from error


def finish(exit_code: int = 0) -> None:
    """Close W&B's run in this process, if any, so that the next job gets its own.

    This also stops wandb's service process, which keeps WANDB_SERVICE in the environment while it runs.

    Data not uploaded within 10 s, or WANDB_FINISH_TIMEOUT seconds (0: no limit), stay on disk for ``wandb sync``.
    A service that does not answer is not waited for; it ends by itself once it can.

    Args:
        exit_code: the process's exit code; W&B marks the run finished (0), failed, or preempted (128 + SIGTERM or
            SIGUSR1).
    """
    import wandb

    if wandb.run is not None:
        limit = seconds("WANDB_FINISH_TIMEOUT", LONGEST_END)
        try:
            within(limit + 2 if limit else None, partial(_end, wandb.run, exit_code))
        except (Exception, SystemExit) as error:
            warn(f"W&B has not finished properly ({line_of(error)}): wandb sync <its folder in wandb/> uploads it")
            abandon()
            return
    try:
        within(LONGEST_TEARDOWN, partial(wandb.teardown, exit_code))  # it writes its data before it ends
    except (Exception, SystemExit) as error:
        warn(f"W&B's service has not ended properly ({line_of(error)})")


def _end(run: Any, exit_code: int) -> None:
    if exit_code in PREEMPTED:
        run.mark_preempting()
    run.finish(exit_code)  # no ``quiet``: a TypeError in wandb 0.31


def abandon() -> None:
    """Drop W&B's run and its service, which has died, hangs, or cannot reach its server."""
    import wandb

    with suppress(Exception, SystemExit):
        within(SHORT_TEARDOWN, partial(wandb.teardown, 1))
    wandb.run = None  # or Lightning's logger would reuse it for the next job

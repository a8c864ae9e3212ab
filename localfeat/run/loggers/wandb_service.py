"""The end of W&B's run and of its service process, in bounded time and by W&B's public calls."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from functools import partial
from typing import Any

from localfeat.run.loggers.deadline import within
from localfeat.utils.errors import UserError

LONGEST_END = 10.0  # seconds in which a run may send what is left, see ``finish``
LONGEST_TEARDOWN = 5.0  # seconds more, in which its service writes what it has to the disk
SHORT_TEARDOWN = 2.0  # of one that has not answered before
PREEMPTED = (128 + signal.SIGTERM, 128 + signal.SIGUSR1)  # exit codes: what batch systems send


def line_of(error: BaseException) -> str:
    """What an error says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def warn(line: str) -> None:
    """Say on stderr what does not stop the training."""
    print(f"warning: {line}", file=sys.stderr)


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
    """Close the run of this process, if there is one, so that the next job gets its own.

    Also stop wandb's service process, which leaves WANDB_SERVICE in the environment as long as it runs.

    What has not been sent after 10 s, or as many as WANDB_FINISH_TIMEOUT says (0: wait as long as it takes), stays on
    the disk for ``wandb sync``. Nobody waits for a service that does not answer: it ends by itself once it can.

    Args:
        exit_code: of the process; W&B then calls the run finished (0), failed, or preempted (128 + SIGTERM, SIGUSR1).
    """
    import wandb

    if wandb.run is not None:
        limit = seconds("WANDB_FINISH_TIMEOUT", LONGEST_END)
        try:
            within(limit + 2 if limit else None, partial(_end, wandb.run, exit_code))
        except (Exception, SystemExit) as error:
            warn(f"W&B has not finished properly ({line_of(error)}): wandb sync <folder of the run in wandb/> sends it")
            abandon()
            return
    try:
        within(LONGEST_TEARDOWN, partial(wandb.teardown, exit_code))  # it writes what it has before it ends
    except (Exception, SystemExit) as error:
        warn(f"W&B's service has not ended properly ({line_of(error)})")


def _end(run: Any, exit_code: int) -> None:
    if exit_code in PREEMPTED:
        run.mark_preempting()
    run.finish(exit_code)  # no ``quiet``: a TypeError in wandb 0.31


def abandon() -> None:
    """Forget W&B's run and its service: it has died, hangs, or has nobody to talk to."""
    import wandb

    with suppress(Exception, SystemExit):
        within(SHORT_TEARDOWN, partial(wandb.teardown, 1))
    wandb.run = None  # or Lightning's logger would take it for the next job's

"""Exceptions with one-line messages, and the exit codes they lead to."""

from __future__ import annotations

from collections.abc import Iterator


class UserError(ValueError):
    """A mistake in what the user asked for.

    The message is one line: what is wrong, with the value, and what would be right. Command lines print it
    and exit with code 2; library callers see an ordinary ``ValueError``.
    """


class RunFailed(RuntimeError):
    """A run that failed although nothing was wrong with what the user asked for: a full disk, a non-finite loss.

    The message is one line. Command lines print it, with how to resume the run, and exit with code 1.
    """


class Diverged(RunFailed):
    """A run whose losses or gradients are no longer finite; if resumed, it would fail again."""


class Stopped(BaseException):
    """A signal told this process to stop, and the process has cleaned up.

    Not an ``Exception``, so that no handler treats it as a failure and carries on. Command lines exit with
    128 + ``signum``.

    Attributes:
        signum: the signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def contexts(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, then its causes and contexts, latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

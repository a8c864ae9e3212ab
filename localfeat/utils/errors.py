"""Exceptions that are told in one line, and how a command then ends."""

from __future__ import annotations

from collections.abc import Iterator


class UserError(ValueError):
    """A mistake in what the user asked for.

    The message is one line: what is wrong, with the value, and what would be right. Command lines print it
    and exit with code 2; library callers see an ordinary ``ValueError``.
    """


class RunFailed(RuntimeError):
    """A run that cannot go on through no mistake in what was asked for: a full disk, a loss that is not finite.

    The message is one line. Command lines print it, with how to go on with the run, and exit with code 1.
    """


class Diverged(RunFailed):
    """A run whose losses or gradients are no longer finite: it would end so again if it went on."""


class Stopped(BaseException):
    """A signal told this process to stop, and it has put its things in order.

    Not an ``Exception``: nobody may take it for a failure and go on. Command lines exit with 128 + ``signum``.

    Attributes:
        signum: of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def contexts(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those during whose handling it was raised, the latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

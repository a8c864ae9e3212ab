"""Call code that may hang without letting the training hang."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


class NoAnswerError(TimeoutError):
    """The call has not returned in time."""


def within(seconds: float | None, action: Callable[[], _T]) -> _T:
    """Return or raise what ``action()`` does within ``seconds`` (None for no limit).

    The action runs in a daemon thread, which may outlive this call but does not keep the process from ending.

    Raises:
        NoAnswerError: the action takes longer.
    """
    if seconds is None:
        return action()
    results: list[_T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(action())
        except BaseException as error:  # SystemExit, too: wandb raises it when its service fails
            errors.append(error)

    thread = threading.Thread(target=call, name="localfeat-within", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise NoAnswerError(f"no answer within {seconds:g} s")
    return results[0]

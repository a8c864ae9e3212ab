"""Calls of code that may hang, in which a training must not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


class NoAnswerError(TimeoutError):
    """It still has not come back."""


def within(seconds: float | None, action: Callable[[], _T]) -> _T:
    """What ``action()`` returns or raises, if it does so within ``seconds`` (None: at any time).

    It runs in a thread of its own, which goes on after that but does not keep the process from ending.

    Raises:
        NoAnswerError: it takes longer.
    """
    if seconds is None:
        return action()
    results: list[_T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(action())
        except BaseException as error:  # SystemExit, too: wandb ends in it when its service has failed
            errors.append(error)

    thread = threading.Thread(target=call, name="localfeat-within", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise NoAnswerError(f"no answer within {seconds:g} s")
    return results[0]

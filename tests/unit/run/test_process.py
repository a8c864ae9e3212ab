"""The process state that a run changes and restores."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest

from localfeat.run.process import clean_process


class RaisesWhenFreed:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __del__(self) -> None:
        raise self.error


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_leaves_no_stack_trace_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch raises wherever the signal arrives, even in a finaliser; the loader raises again."""
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append(str(found.exc_value)))
    with clean_process(0):
        RaisesWhenFreed(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))
        RaisesWhenFreed(RuntimeError("another fault"))
        gc.collect()
    assert told == ["another fault"]
    RaisesWhenFreed(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))
    gc.collect()
    assert len(told) == 2

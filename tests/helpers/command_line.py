"""Run the command lines in this process; subprocesses would spend seconds on imports."""

from __future__ import annotations

import importlib
import logging
import re
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from localfeat.studies.commands import COMMANDS


def call(monkeypatch: pytest.MonkeyPatch, command: str, *arguments: str) -> int:
    """Run ``localfeat <command> <arguments>`` in the current folder; return its exit code."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [f"localfeat {command}", *arguments])
    try:
        importlib.import_module(COMMANDS[command][0]).main()
    except SystemExit as left:
        return 0 if left.code is None else int(left.code)
    finally:
        GlobalHydra.instance().clear()
        _forget_captured_output()
    return 0


def _forget_captured_output() -> None:
    """Remove Hydra's log handlers, which write to this test's stdout and would fail once that is closed."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)


def said_at_once(out: str) -> bool:
    """Return whether ``out`` is nothing, or only what a run says of itself before it trains."""
    return re.fullmatch(r"(.* on \w+: .* at \d+ px\n(.* parameters, K=.*\n)?)?", out) is not None

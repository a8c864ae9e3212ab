"""Sweeps of a small study whose jobs are stand-ins for runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from localfeat.studies.sweep import task
from tests.helpers.command_line import call

PROGRAM = (sys.executable, "-S", "-I", str(Path(__file__).with_name("stand_in.py")))
ROOT = Path(__file__).resolve().parents[2]
E2E, K2, K4 = "method=e2e,seed=0", "method=feature_recon,split=k2,seed=0", "method=feature_recon,split=k4,seed=0"
STUDY = """
question: Which?
overrides: [epochs=3]
jobs:
  - method=e2e seed=0
  - method=feature_recon split=k2,k4 seed=0
"""
AGAIN = "study=mine/study.yaml", "folder=out"
IN_A_PROCESS = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); from localfeat.studies.sweep import task; "
    f"task.PROGRAM = {PROGRAM!r}; "
    "from localfeat.studies.sweep.command import main; main()"
)


class Place:
    """The current folder, with the study ``mine`` in it.

    Args:
        folder: an empty folder.
        patch: the test's monkeypatch.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        (folder / "mine").mkdir()
        (folder / "mine" / "study.yaml").write_text(STUDY)
        patch.chdir(folder)
        patch.setattr(task, "PROGRAM", PROGRAM)

    def sweep(self, *typed: str) -> int:
        """Run a sweep in this process, without the slow composing of configurations; return the exit code."""
        self.patch.setattr("localfeat.studies.sweep.command.compose_all", lambda jobs: [])
        return call(self.patch, "sweep", *AGAIN, *typed)

    def start(self, *typed: str) -> subprocess.Popen[str]:
        """Start a sweep in its own process."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-c", IN_A_PROCESS, *AGAIN, *typed]
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def behave(self, **behaviour: Any) -> None:
        """Write the jobs' behaviour; see ``stand_in``."""
        named = {"e2e": E2E, "k2": K2, "k4": K4}
        content = {named[job]: what for job, what in behaviour.items()}
        (self.folder / "behaviour.json").write_text(json.dumps(content))

    def job(self, name: str) -> Path:
        return self.folder / "out" / name

    def attempts(self) -> list[list[str]]:
        """Return the attempts of every job, in the order of the study."""
        files = [self.job(name) / "attempts.txt" for name in (E2E, K2, K4)]
        return [file.read_text().split() if file.exists() else [] for file in files]

    def summaries(self) -> dict[str, str]:
        return {file.parent.name: file.read_text() for file in sorted(self.folder.glob("out/*/summary.json"))}


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, limited only by the test's own timeout."""
    while not condition():
        time.sleep(0.02)

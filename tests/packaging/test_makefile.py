"""The Makefile: its help, and when it installs. A stand-in for the interpreter writes down what it is asked for."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.project import ROOT

INTERPRETER = """#!/bin/sh
case "$*" in
    *version_info*) exit "${UNSUPPORTED:-0}" ;;
    '-m venv --clear .venv') rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo venv >> calls ;;
    '-m pip install '*) echo install >> calls; exit "${INSTALL_FAILS:-0}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with a space in its name, where only the Makefile is real."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    interpreter = folder / "interpreter"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    return folder


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # a make around this test run hands its own flags down
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment = inherited | {"PYTHON": str(folder / "interpreter")} | variables
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def calls(folder: Path) -> list[str]:
    """What the interpreter was asked for since the last look."""
    log = folder / "calls"
    lines = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_help_lists_every_target(checkout: Path) -> None:
    phony = re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    listed = re.findall(r"^make (\S+) +\S", make(checkout).stdout, re.MULTILINE)
    assert listed == phony
    assert {"setup", "run", "test", "test-slow", "check", "format", "constraints", "clean", "distclean"} <= set(listed)


def test_setup_installs_once(checkout: Path) -> None:
    assert make(checkout, "setup").returncode == 0
    assert calls(checkout) == ["venv", "install"]
    assert make(checkout, "setup").returncode == 0
    assert calls(checkout) == []


@pytest.mark.parametrize("name", ["pyproject.toml", "setup.py", "constraints.txt"])
def test_setup_installs_again_after_a_change(checkout: Path, name: str) -> None:
    make(checkout, "setup")
    calls(checkout)
    later = (checkout / ".venv" / ".installed").stat().st_mtime + 1
    os.utime(checkout / name, (later, later))
    assert make(checkout, "setup").returncode == 0
    assert calls(checkout) == ["install"]


def test_setup_cut_short_starts_anew(checkout: Path) -> None:
    failed = make(checkout, "setup", INSTALL_FAILS="1")
    assert failed.returncode != 0
    assert "Installation failed" in failed.stderr
    calls(checkout)
    assert make(checkout, "setup").returncode == 0
    assert calls(checkout) == ["venv", "install"]


def test_setup_refuses_an_unsupported_python(checkout: Path) -> None:
    refused = make(checkout, "setup", UNSUPPORTED="1")
    assert refused.returncode != 0
    assert "none is Python 3.11 or 3.12" in refused.stderr
    assert not (checkout / ".venv").exists()

"""Law 9: a room imports only rooms below it, nothing goes in circles, and breaking that is noticed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.project import ROOT

LINTER = Path(sys.executable).with_name("lint-imports")


def verdict(folder: Path) -> tuple[int, str]:
    """Exit code and output of the linter on the package in ``folder``."""
    ended = subprocess.run([LINTER, "--no-cache", "--no-logo"], cwd=folder, capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr


def test_law_9_the_import_law_holds() -> None:
    code, said = verdict(ROOT)
    assert code == 0, said


@pytest.mark.parametrize(
    ("file", "wrong"),
    [
        ("utils/text.py", "from localfeat.run.folder import RunFolder"),
        ("methods/greedy_linear.py", "from localfeat.learner.module import Learner"),
        ("run/folder.py", "from localfeat.studies.sweep.folder import StudyFolder"),
        ("efficiency/settings.py", "from localfeat.data.datamodule import ImageDataModule"),
        ("methods/trgl.py", "from localfeat.methods.auglocal import AugLocal"),
        ("learner/module.py", "import hydra"),
        ("memory/planner.py", "from localfeat.memory.fitted import fitted"),
    ],
)
def test_law_9_an_import_that_is_turned_round_is_found(file: str, wrong: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "localfeat", tmp_path / "localfeat", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    broken = tmp_path / "localfeat" / file
    broken.write_text(broken.read_text().replace("from __future__ import annotations\n", f"{wrong}\n", 1))
    code, said = verdict(tmp_path)
    assert code == 1 and "BROKEN" in said

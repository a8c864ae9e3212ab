"""Read and copy the project's files for the packaging tests."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def project_table() -> dict[str, Any]:
    """Return the [project] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def copy_sources(target: Path) -> Path:
    """Copy the files that a build reads, so that building leaves nothing in the checkout."""
    target.mkdir()
    for folder in ("localfeat", "conf"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for study in ROOT.glob("experiments/*/study.yaml"):
        (target / study.relative_to(ROOT)).parent.mkdir(parents=True)
        shutil.copy2(study, target / study.relative_to(ROOT))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, target)
    return target


def run_pip(*arguments: str | Path) -> None:
    """Run pip with the build tools of this environment: no network, no isolated build."""
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

"""The learner and its schedules do no I/O: what is said, written or read belongs to callbacks and commands."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("localfeat/learner", "localfeat/parallel")
MODULES = ("io", "logging", "os", "pathlib", "safetensors", "shutil", "subprocess", "sys", "tempfile")
CALLS = ("input", "open", "print")


def uses_of_io(source: str) -> Iterator[str]:
    """Imports of modules that read and write, and calls of the built-in functions that do."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Name) and node.id in CALLS:
            yield node.id
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.save", "torch.load"):
            yield ast.unparse(node)
        yield from (name for name in names if name.partition(".")[0] in MODULES)
        yield from (name for name in names if name == "localfeat.utils.files")


@pytest.mark.parametrize("room", ROOMS)
def test_the_learner_does_no_io(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): list(uses_of_io(file.read_text())) for file in files}
    assert {file: uses for file, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from pathlib import Path",
        "import sys",
        "from safetensors.torch import save",
        "from localfeat.utils.files import write_whole",
        "print('x')",
        "with open('x') as file: pass",
        "torch.save({}, 'x')",
    ],
)
def test_uses_of_io_are_found(line: str) -> None:
    assert len(list(uses_of_io(f"import torch\ndef f():\n    {line}\n"))) == 1

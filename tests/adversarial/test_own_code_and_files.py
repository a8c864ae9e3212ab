"""Files that a user writes for localfeat, configurations and methods: a mistake in one is a line that names it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm

import localfeat.methods
from localfeat import Learner, Method, UserError
from localfeat.methods import registry
from localfeat.methods.base import REGISTERED
from tests.helpers.command_line import call

FILES = {
    "method/half": ("foo: [1\n", "c/method/half.yaml, line 2: expected ',' or ']'"),
    "method/twice": ("a: 1\na: 2\n", "c/method/twice.yaml, line 2: found duplicate key a"),
    "method/listed": ("- a\n", "method=listed: its file is no key: value lines"),
    "method/based": ("defaults: [trgll]\n", "method=based: its defaults name method/trgll, which is no file"),
    "method/number": ("defaults: 3\n", "defaults must be a list"),
    "backbone/old.yml": ("name: resnet18\n", "c/backbone/old.yml: rename it to old.yaml"),
    "backbone/empty": ("", "<value>, or name: <value> in the file of backbone=empty"),
    "backbone/other": ("nmae: resnet18\n", "<value>, or name: <value> in the file of backbone=other"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_configuration_file(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, line = FILES[file]
    path = tmp_path / "c" / (file if "." in file else f"{file}.yaml")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "run", "--config-dir", "c", file.removesuffix(".yml").replace("/", "=")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and line in err


HEAD = "from dataclasses import dataclass\nfrom localfeat.methods.base import Method, register\n\n\n"
MODULES = {
    "def build(": r"line 1: SyntaxError: '\(' was never closed$",
    "import nothing_of_that_name": "line 1: ModuleNotFoundError: No module named",
    f"{HEAD}@register()\n@dataclass(frozen=True)\nclass Toy(Method):\n    def build(self, site, decoder): ...\n": (
        r"line 5: TypeError: .*missing 1 required positional argument: 'name'"
    ),
    f"{HEAD}@register()\nclass Toy(Method):\n    name: str = 'toy'\n    def build(self, site, decoder): ...\n": (
        r"line 5: ValueError: decorate Toy with @dataclass\(frozen=True\) below @register\(\)"
    ),
}


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder beside localfeat/methods, whose files are imported as if they lay there."""
    monkeypatch.setattr(localfeat.methods, "__path__", [*localfeat.methods.__path__, str(tmp_path)])
    return tmp_path


@pytest.mark.parametrize("text", MODULES)
def test_a_file_among_the_methods(text: str, methods: Path) -> None:
    (methods / "toy.py").write_text(text)
    before = dict(REGISTERED)
    with pytest.raises(UserError, match=f"^localfeat/methods/toy.py, {MODULES[text]}"):
        registry._discovered()
    assert before == REGISTERED


def test_every_command_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text("def build(\n")
    code = (
        "import sys, localfeat.methods as m; m.__path__.append('.'); from localfeat.studies.commands import main;"
        "sys.argv = ['localfeat', 'run', '--help']; main()"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("error: localfeat/methods/toy.py, line 1: SyntaxError")


def test_build_returns_an_objective() -> None:
    class Mine(Method):
        def build(self, site: object, decoder: object) -> None:  # type: ignore[override]
            pass

    with pytest.raises(UserError, match=r"^the method's build returns NoneType: return a localfeat\.Objective$"):
        Learner(timm.create_model("test_vit", num_classes=3), Mine("mine"), 2)

"""Configurations can only call code of localfeat and of packages that the user trusts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from localfeat.run import trust
from localfeat.run.construct import construct
from localfeat.utils.errors import UserError
from tests.helpers.hostile import refused, watched
from tests.helpers.whole_runs import SMALL


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the file of :func:`tests.helpers.hostile.watched`."""
    with watched(tmp_path, monkeypatch) as path:
        yield path


FOREIGN = ["os.system", "subprocess.run", "builtins.eval", "hostile.Mine", "hostile.sub.Mine", "torch.load"]
NO_PART = [
    "localfeat.run.checkpoints.files.os.system",
    "localfeat.utils.files.os",
    "localfeat.run.configuration.importlib",
    "localfeat.Learner",
    "localfeat.run.conf_dir.Path",
    "localfeat.run.command.main",
    "localfeat.Method.__init__",
    "localfeat.nothing",
    "localfeat..Method",
    ".localfeat.Method",
    "localfeat",
    "Method",
    "",
    None,
    3,
    ["localfeat.Method"],
    {"_target_": "os.system"},
    "localfeat.Method\n",
    "localfeat.methods:Method",
]


@pytest.mark.parametrize("path", [*FOREIGN, *NO_PART], ids=repr)
@pytest.mark.parametrize("group", ["method", "logger"])
def test_only_localfeats_own_parts_are_built(path: object, group: str, marker: Path) -> None:
    before = set(sys.modules)
    with pytest.raises(UserError, match=rf"{group}\._target_=") as caught:
        trust.find(path, group)
    assert ("LOCALFEAT_TRUST=" in str(caught.value)) == (path in FOREIGN)
    assert not marker.exists() and "hostile" not in set(sys.modules) - before


def test_parts_fit_their_group() -> None:
    for group, path in (("method", "localfeat.Split"), ("split", "localfeat.Method"), ("decoder", "localfeat.Split")):
        with pytest.raises(UserError, match="it must be one of \(or derived from\) localfeat"):
            trust.find(path, group)


@pytest.mark.parametrize("group", ["method", "split", "decoder", "optimizer", "efficiency", "dataset"])
def test_a_foreign_target_is_refused_on_the_command_line(
    group: str, marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(monkeypatch, capsys, "run", *SMALL, f"{group}._target_=hostile.make")
    assert "environment variable LOCALFEAT_TRUST=hostile" in line
    assert not marker.exists() and not (marker.parent / "outputs").exists()


def test_a_trusted_package_is_built(marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_GIVEN", "other, hostile")
    made = construct({"_target_": "hostile.Mine", "name": "mine"}, "method")
    assert type(made).__name__ == "Mine" and marker.exists()
    with pytest.raises(UserError, match="it makes a dict, where a Method is needed"):
        construct({"_target_": "hostile.make"}, "method")
    with pytest.raises(UserError, match="that hostile itself defines"):
        trust.find("hostile.mkdir", "method")  # only imported there
    with pytest.raises(UserError, match="LOCALFEAT_TRUST=os"):
        trust.find("os.mkdir", "method")


@pytest.mark.parametrize("given", ["*", "a b", "mine,*", "os.", "-"])
def test_trust_names_packages(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_GIVEN", given)
    with pytest.raises(UserError, match=r"is not a package name"):
        trust.trusted()


def test_trust_is_what_the_environment_says_when_the_process_begins() -> None:
    code = "import os; from localfeat.run import trust; os.environ['LOCALFEAT_TRUST'] = 'os'; print(trust.trusted())"
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "LOCALFEAT_TRUST": "mine"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "('mine',)\n"


OF_HYDRA = {
    "callback": "callbacks: {evil: {_target_: hostile.make}}",
    "handler": "job_logging: {handlers: {console: {class: hostile.Mine}}}",
    "factory": "job_logging: {formatters: {simple: {(): hostile.make}}}",
    "stream": "job_logging: {handlers: {console: {stream: ext://hostile.make}}}",
    "stream of cfg": "hydra_logging: {root: {handlers: [], x: 'cfg://a'}}",
    "launcher": "launcher: {_target_: hostile.make}",
    "sweeper": "sweeper: {_target_: hostile.make}",
    "variable": "job: {env_set: {LOCALFEAT_TRUST: hostile}}",
    "callback elsewhere": "callbacks: {evil: '${dataset}'}",
    "variables elsewhere": "job: {env_set: '${dataset}'}",
}


@pytest.mark.parametrize(("kind", "multirun"), [*((kind, False) for kind in OF_HYDRA), ("callback", True)])
def test_a_configuration_file_sets_nothing_of_hydras_that_is_code(
    kind: str, multirun: bool, marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/evil.yaml").write_text(f"# @package _global_\nhydra:\n  {OF_HYDRA[kind]}\n")
    options = ["--config-dir", "conf", *(["-m"] if multirun else [])]
    assert "hydra." in refused(monkeypatch, capsys, "run", *options, *SMALL, "experiment=evil", "epochs=0")
    assert not marker.exists() and "hostile" not in sys.modules and not Path("outputs").exists()


@pytest.mark.parametrize(
    "typed",
    [
        ["-m", "experiment=harmless,evil"],
        ["-m", "experiment=choice(harmless,evil)"],
        ["experiment=sweeps"],
        ["--config-name", "evil"],
        ["+hydra.callbacks.evil._target_=hostile.make"],
        ["+dataset@hydra.callbacks.evil=digits", "+hydra.callbacks.evil._target_=hostile.make"],
    ],
    ids=str,
)
def test_no_way_leads_around_it(
    typed: list[str], marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Jobs of a sweep (also one started by a file), another config name, and a study's overrides are all checked."""
    Path("conf/experiment").mkdir(parents=True)
    evil = f"# @package _global_\nhydra:\n  {OF_HYDRA['handler']}\n"
    Path("conf/decoder").mkdir()
    for group in ("experiment", "decoder"):
        Path(f"conf/{group}/evil.yaml").write_text(evil)
    Path("conf/evil.yaml").write_text("defaults: [config]\nhydra: {callbacks: {evil: {_target_: hostile.make}}}\n")
    Path("conf/experiment/harmless.yaml").write_text("# @package _global_\nseed: 3\n")
    sweep = "{mode: MULTIRUN, sweeper: {params: {decoder: 'interp,evil'}}}"
    Path("conf/experiment/sweeps.yaml").write_text(f"# @package _global_\nhydra: {sweep}\n")
    assert "hydra." in refused(monkeypatch, capsys, "run", "--config-dir", "conf", *typed, *SMALL, "epochs=0")
    assert not marker.exists() and "hostile" not in sys.modules and not Path("outputs").exists()

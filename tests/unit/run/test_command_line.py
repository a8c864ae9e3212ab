"""What is typed: paths as the shell and the user mean them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import localfeat
from localfeat.run.command_line import arranged, explain, parse_arguments, run_command
from localfeat.run.composition import composed
from localfeat.studies import commands
from localfeat.utils.errors import UserError
from tests.helpers.command_line import call
from tests.helpers.whole_runs import SMALL


@pytest.mark.parametrize(
    "path", ["bilder_jürgen", "run=1", "epoch=0-step=4.ckpt", "~/runs", "Photos (1)", "a,b c(", "it's=1", "plain/a-b.c"]
)
def test_paths_that_are_not_hydras_grammar_are_taken_as_text(path: str) -> None:
    for key in ("dataset.root", "backbone.weights", "output_dir", "resume"):
        (typed,) = arranged([f"{key}={path}"])
        assert OverridesParser.create().parse_override(typed).value() == os.path.expanduser(path)


def test_other_arguments_stay() -> None:
    given = ["-m", "dataset.root=a,b", "backbone.weights=null", "method.name=ü", "seed=0,1"]
    assert arranged(given) == given


def test_options_may_stand_anywhere() -> None:
    assert arranged(["split=k4", "--config-dir", "here", "seed=1", "-m"]) == [
        *("--config-dir", "here", "-m"),
        *("split=k4", "seed=1"),
    ]


def test_home_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "run", *SMALL, "epochs=1", "output_dir=~/runs") == 0
    (folder,) = (tmp_path / "runs").glob("*/*")
    assert OmegaConf.load(folder / "config.yaml").output_dir == f"{tmp_path}/runs"
    assert not (tmp_path / "~").exists()
    there = f"run=~/{folder.relative_to(tmp_path)}"
    assert call(monkeypatch, "evaluate", there, "json=~/figures.json") == 0 and (tmp_path / "figures.json").is_file()
    assert parse_arguments("", {"images": ...}, ["images=~/here"]) == {"images": f"{tmp_path}/here"}


def test_ctrl_c_while_a_command_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "interrupted_module.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit) as left:
        run_command("interrupted_module")
    assert (left.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["localfeat", "--version"])
    commands.main()
    assert capsys.readouterr().out == f"localfeat {localfeat.__version__}\n"


def test_torch_says_nothing_of_its_caches_at_exit() -> None:
    """By atexit it logs figures with level INFO, also after Ctrl-C."""
    settings = composed([], hydra_too=True).hydra.job_logging
    assert settings.root.level == "INFO" and settings.loggers.torch.level == "WARNING"


def test_what_start_up_froze_is_collected_at_exit() -> None:
    """Else nanobind, in triton, lists all it made as leaked."""
    code = (
        "import atexit, gc; from localfeat.run.quick_imports import quick_imports\n"
        "atexit.register(lambda: print(gc.get_freeze_count()))\n"
        "with quick_imports(): pass\n"
        "print(gc.get_freeze_count() > 0)"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "True\n0\n"


@pytest.mark.parametrize("kind", [RuntimeError, UserError])
def test_torch_without_memory_is_one_line(kind: type[Exception]) -> None:
    raw = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    error = kind(f"{raw} allocate 1610612736 bytes. Error code 12 (Cannot allocate memory)")
    assert explain(error) == "out of memory (1.50 GiB asked for): localfeat plan shows what fits"


def test_too_many_open_files_name_the_limit() -> None:
    for error in (OSError(24, "Too many open files"), RuntimeError("received 0 items of ancdata")):
        assert explain(error) == "too many open files: raise the limit (ulimit -n 4096), or lower dataset.num_workers"

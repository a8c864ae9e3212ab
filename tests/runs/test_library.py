"""``localfeat.compose`` and ``localfeat.train``: the command line from Python."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import localfeat
from localfeat.run.conf_dir import conf_dir
from localfeat.utils.errors import UserError
from tests.helpers.command_line import call
from tests.helpers.whole_runs import SMALL, files_below, metrics


def test_train_is_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    summary = localfeat.train([*SMALL, "split=k4", "output_dir=here"])
    (folder,) = (tmp_path / "here").glob("*/*_digits_feature_recon")
    assert summary == json.loads((folder / "summary.json").read_text())
    assert call(monkeypatch, "run", *SMALL, "split=k4", f"hydra.run.dir={tmp_path}/typed") == 0
    assert metrics(folder) == metrics(tmp_path / "typed")
    assert files_below(folder) == files_below(tmp_path / "typed")
    assert localfeat.train([*SMALL, "split=k4", "output_dir=here", "resume=auto"]) == summary
    assert localfeat.train(SMALL, "chosen")["overrides"] == SMALL and (tmp_path / "chosen" / "summary.json").is_file()


def test_compose_gives_the_checked_configuration() -> None:
    found = localfeat.compose(["dataset=cifar10", "split=k2", "optimizer.lr=0.01"])
    assert (found.image_size, found.split.modules, found.optimizer.lr) == (224, 2, 0.01)
    assert found.method.name == "feature_recon" and found.dataset.source == "cifar10"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["epoch=3"], "epoch: there is no such key; did you mean epochs?"),
        (["method=foo"], "method=foo: it is one of "),
        (["epochs=abc"], "epochs=abc: it must be a whole number"),
        (["epochs=0"], "epochs=0: it must be at least 1"),
        (["split=cuts", "split.cutz=[1]"], "split.cutz: there is no such key; did you mean split.cuts?"),
        (["backbone=timm"], "backbone.name has to be given: backbone.name=<value>"),
        (["seed=0,1"], "seed=0,1: several values make a sweep"),
    ],
)
def test_mistakes_are_the_lines_of_the_command(overrides: list[str], line: str) -> None:
    for function in (localfeat.compose, localfeat.train):
        with pytest.raises(UserError) as error:
            function(overrides)
        assert str(error.value).startswith(line)
        assert error.value.__suppress_context__ and error.value.__cause__ is None  # a script's stack trace is short


@pytest.mark.parametrize("overrides", ["seed=1", [1], None, ["-m", "seed=0,1"], ["--version"]])
def test_what_is_no_list_of_overrides(overrides: Any) -> None:
    for function in (localfeat.compose, localfeat.train):
        with pytest.raises(UserError, match=r"give a list of texts|options belong to the command line"):
            function(overrides)
    with pytest.raises(UserError, match="give the path of a folder"):
        localfeat.train([], "")


def test_threads_compose_at_the_same_time() -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: localfeat.compose([f"seed={seed}"]).seed, range(8)))
    assert found == list(range(8))


def test_an_application_s_own_hydra_stays() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir() / "dataset"), version_base="1.3"):
        localfeat.compose([])
        assert compose("digits").source == "digits"

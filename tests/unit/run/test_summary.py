"""summary.json and its record of machine and source."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from localfeat.run import summary as module
from localfeat.run.summary import RunSummary, environment, git_commit, write_summary


def a_summary(**changes: object) -> RunSummary:
    fields: dict = {
        "method": "feature_recon",
        "dataset": "digits",
        "backbone": "swin_micro",
        "split": [1, 1],
        "decoder": "one_layer",
        "seed": 0,
        "epochs": 3,
        "batch_size": 64,
        "precision": "32-true",
        **environment(),
    }
    return RunSummary(**{**fields, **changes})


def test_summary_round_trip_keeps_values_and_order(tmp_path: Path) -> None:
    summary = a_summary(test_accuracy=torch.tensor(0.5), parameters={"total": np.int64(7)}, overrides=["seed=0"])
    assert write_summary(tmp_path / "run" / "summary.json", summary) == []
    read = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(read) == list(summary.to_dict())
    assert (read["test_accuracy"], read["parameters"], read["split"]) == (0.5, {"total": 7}, [1, 1])
    assert read["images_per_second"] is None


def test_numbers_that_json_lacks_become_null_and_are_named(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    summary = a_summary(module_losses={"module_1": float("nan"), "module_2": 1.0}, seconds=float("inf"))
    assert write_summary(path, summary) == ["seconds", "module_losses.module_1"]
    read = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["module_losses"] == {"module_1": None, "module_2": 1.0}
    assert read["not_finite"] == ["seconds", "module_losses.module_1"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, {"a": 1})
    with pytest.raises(TypeError, match=r"'b\.c' is a object"):
        write_summary(path, {"b": {"c": object()}})

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_summary(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_environment_names_versions_and_hardware() -> None:
    found = environment()
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] == torch.__version__
    )
    assert set(found["versions"]) == {"python", "torch", "lightning", "timm", "torchvision", "localfeat"}
    assert found["hardware"]["cpu"] and found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_gib"] > 0.1
    assert sys.orig_argv[0] in found["command"]


def run_git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_of_the_source_and_whether_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "checkout" / "package" / "summary.py"
    source.parent.mkdir(parents=True)
    source.write_text("one\n")
    run_git(tmp_path, "init", "-q", "checkout")
    assert git_commit(source) is None, "not tracked: an environment inside somebody's checkout"
    run_git(source.parent, "add", ".")
    run_git(source.parent, "commit", "-q", "-m", "one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    commit = git_commit(source)
    assert commit is not None and not commit["dirty"] and len(commit["id"]) == 40
    source.write_text("two\n")
    assert git_commit(source) == {"id": commit["id"], "dirty": True}


def test_no_commit_outside_a_checkout_or_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "summary.py"
    source.write_text("")
    assert git_commit(source) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None

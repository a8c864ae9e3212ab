"""Tab completion of ``localfeat``: what a shell asks, and the answers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.project import ROOT


def completion(argument: str, line: str = "") -> str:
    return subprocess.run(
        [sys.executable, "-m", "localfeat", "-sc", argument],
        cwd=ROOT,
        env={"COMP_LINE": line, "COMP_POINT": str(len(line)), "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("localfeat ", ["run", "plan", "evaluate", "predict", "sweep", "report", "probe"]),
        ("localfeat p", ["plan", "predict", "probe"]),
        ("localfeat run method=feature", ["method=feature_recon", "method=feature_recon_ce"]),
        ("localfeat run split=k4 dataset=ci", ["dataset=cifar10", "dataset=cifar100"]),
        ("localfeat run optimizer.weight", ["optimizer.weight_decay="]),
        ("localfeat evaluate run=", []),
    ],
)
def test_a_line_is_completed(line: str, expected: list[str]) -> None:
    assert completion("query=bash", line).split() == expected


def test_what_the_shell_evaluates() -> None:
    script = completion("install=bash")
    assert script.splitlines()[-1].endswith("complete -o nospace -o default -F hydra_bash_completion localfeat")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)

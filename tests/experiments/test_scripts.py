"""The scripts that need a GPU or much time, run on small networks on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.gpu import measure
from experiments.memory import accuracy
from localfeat.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu(tmp_path: Path) -> None:
    """All parts, written as they go, within the time it is given."""
    done = subprocess.run(
        ["bash", "experiments/gpu/run.sh", "small=true", "minutes=12", f"results={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\d+ skipped", (tmp_path / "tests.txt").read_text())
    rows = {part: json.loads((tmp_path / f"{part}.json").read_text())["rows"] for part in measure.SHARES}
    plan = measure.small()
    assert [row["key"] for row in rows["memory"]] == 2 * [case.key for case in plan.memory]
    assert all(row["predicted"] == pytest.approx(row["measured"], rel=0.01) for row in rows["memory"])
    assert [row["key"] for row in rows["steps"]] == 2 * [case.key for case in plan.timed]
    assert all(row["step_seconds"] > 0 and row["rounds"] >= 1 for row in rows["steps"])
    assert [row["method"] for row in rows["accuracy"]] == list(measure.accuracy.METHODS)
    for part, found in rows.items():
        table = (tmp_path / f"{part}.md").read_text().splitlines()
        assert len([line for line in table if line.startswith("| ")]) == 2 + len(found)


def test_without_a_gpu_the_gpu_script_says_how_to_rehearse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["measure.py", "minutes=1"])
    with pytest.raises(UserError, match="finds no GPU to use; small=true rehearses on the CPU"):
        measure.main()


def test_accuracy_is_the_mean_over_seeds() -> None:
    rows = [{"method": "e2e", "test_accuracy": x, "epochs": 3, "images_per_second": 10.0} for x in (0.5, 0.6)]
    assert "| `e2e` | 55.00 ± 7.07 | 2 | 3 | 10 |" in measure.accuracy.render(rows)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_prediction_is_what_a_run_measures() -> None:
    case = next(case for case in accuracy.CPU if case[1] and case[4] == "feature_recon")
    done = subprocess.run(
        [sys.executable, "experiments/memory/accuracy.py", json.dumps(case)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.01)
    assert found["modules_predicted"] == pytest.approx(found["modules_measured"], rel=0.05)
    assert found["resident"] > 0.9 * found["measured"]


def test_the_table_of_predictions_quotes_the_median_and_the_worst_error() -> None:
    first = {"network": "swin_tiny", "arguments": {}, "batch": 8, "method": "e2e", "cuts": [], "decoder": "interp"}
    row = {**first, "precision": "32-true", "efficiency": "none", "resident": None, "source": "counting"}
    rows = [{**row, "predicted": predicted, "measured": 100 * 2**20} for predicted in (101 * 2**20, 98 * 2**20)]
    about = {"versions": {"torch": "2"}, "hardware": {"cpu": "a CPU"}}
    text = accuracy.table(rows, about)
    assert "median error 1.50%, worst 2.00%" in text
    assert "| 1.0100 |" in text
    assert "| 0.9800 |" in text

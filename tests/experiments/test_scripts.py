"""The scripts that need a GPU or much time, run on small networks on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.memory import accuracy, gpu
from tests.experiments.test_memory_study import PLAN

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_gpu_script_measures_every_setting_and_writes_a_table() -> None:
    plan = replace(PLAN, precisions=("32-true", "bf16-mixed"), main=replace(PLAN.main, batch_size=8))
    rows = gpu.measure(plan, rounds=1, device="cpu")
    assert [(row["precision"], row["key"]) for row in rows] == [
        (precision, case.key) for precision in plan.precisions for case in plan.timed
    ]
    assert all(row["predicted"] > 0 and row["step_seconds"] > 0 and row["measured"] is None for row in rows)
    lines = gpu.render(rows, plan.timed[0].key).splitlines()
    assert len(lines) == 2 + len(rows)
    assert all(f" {row['step_seconds']:.3f} " in line for row, line in zip(rows, lines[2:], strict=True))


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

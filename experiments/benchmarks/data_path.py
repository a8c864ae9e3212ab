"""Share of an epoch that in-memory data spends outside the training step.

    python experiments/benchmarks/data_path.py [folder of CIFAR-10 as images]

Trains `e2e` (the shortest step, so the largest share) for some epochs on the digits and, if a folder is given, on
CIFAR-10 at 32 px, by the command line, and reads the logged speed/outside_step: the time between the end of one
training step and the beginning of the next (loader, logging, hooks) as a share of the epoch's.
Augmentation and resizing happen inside the step and count as step. Results: experiments/results/data_path.{json,md}.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from localfeat.run.loggers.metrics_csv import read_series
from localfeat.run.summary import environment

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "experiments" / "results"


def shares(overrides: list[str]) -> list[float]:
    """Return the share of every epoch but the first, which warms up."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "localfeat.run", "method=e2e", f"hydra.run.dir={folder}", *overrides]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        series = read_series(Path(folder) / "metrics.csv")["speed/outside_step"]
    return [value for _, value in series[1:]]


def main() -> None:
    """Measure and write the results."""
    jobs: dict[str, list[str]] = {"digits, 16 px, fp32": ["epochs=6"]}
    if len(sys.argv) > 1:
        root = Path(sys.argv[1]).expanduser().resolve()
        jobs["CIFAR-10, 32 px, bf16"] = ["experiment=cifar10_small", f"dataset.root={root}", "epochs=3"]
    found: dict[str, Any] = {name: shares(overrides) for name, overrides in jobs.items()}
    lines = ["| data | epochs | median share outside the step | largest |", "|---|---|---|---|"]
    lines += [f"| {name} | {len(v)} | {median(v):.2%} | {max(v):.2%} |" for name, v in found.items()]
    facts = environment()
    lines += ["", f"`e2e`, micro Swin, {facts['hardware']['cores']} cores of {facts['hardware']['cpu']}."]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "data_path.md").write_text("\n".join(lines) + "\n")
    record = {"shares": found} | {key: facts[key] for key in ("versions", "hardware", "commit")}
    (RESULTS / "data_path.json").write_text(json.dumps(record, indent=2) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

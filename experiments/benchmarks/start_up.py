"""Start-up: seconds until `import localfeat` and `--help` have ended, the first line, the first training step.

    python experiments/benchmarks/start_up.py [checkout …] [rounds=7]

The checkouts (this one by default) take turns in every round, so that other work on the machine slows all alike.
Figures are medians: wall seconds, and CPU seconds of the process. The profile lists the packages whose imports take the
most.
Results: experiments/results/start_up.{json,md}.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
SHOWN = 12  # packages in the profile

RUN = ["trainer=cpu", "epochs=1", "trainer.limit_train_batches=1", "hydra.run.dir=/nonexistent/run"]
UNTIL = """
import os, sys, time
import {module}
def end(*_):
    os.write(2, f"CPU {{time.process_time()}}\\n".encode())
    os._exit(0)
{patch}
sys.argv = ["localfeat", *{arguments}]
{module}.main()
"""
FIRST_LINE = """
class Out:
    encoding, isatty, flush = "utf-8", lambda self: False, lambda self: None
    def write(self, text):
        end()
sys.stdout = Out()
"""
FIRST_STEP = """
import importlib.abc
class Step(importlib.abc.MetaPathFinder):  # patches the learner once it is imported
    def find_spec(self, name, path, target=None):
        learner = sys.modules.get("localfeat.learner.module")
        if learner is not None and hasattr(learner, "Learner"):
            learner.Learner.training_step = end
sys.meta_path.insert(0, Step())
"""
POINTS = {
    "import localfeat": "import sys, time, localfeat; print('CPU', time.process_time(), file=sys.stderr)",
    "localfeat --help": (
        "import sys, time, localfeat.studies.commands as c; sys.argv = ['localfeat', '--help']; c.main();"
        "print('CPU', time.process_time(), file=sys.stderr)"
    ),
    "first line of a run": UNTIL.format(module="localfeat.run.command", patch=FIRST_LINE, arguments=RUN),
    "first training step": UNTIL.format(module="localfeat.run.command", patch=FIRST_STEP, arguments=RUN),
}


def measure(checkout: Path, code: str, folder: str) -> tuple[float, float]:
    """Return wall and CPU seconds of a new process of a checkout until it says its CPU time."""
    code = code.replace("/nonexistent/run", folder)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=_environment(checkout), capture_output=True, text=True, timeout=120
    )
    wall = time.perf_counter() - started
    found = re.search(r"^CPU (\S+)$", done.stderr, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{checkout}: {done.stderr[-500:]}")
    return wall, float(found[1])


def profile(checkout: Path, folder: str) -> dict[str, float]:
    """Return the seconds that importing each package's own modules takes until the first training step."""
    code = POINTS["first training step"].replace("/nonexistent/run", f"{folder}/profile")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        cwd="/",
        env=_environment(checkout),
        capture_output=True,
        text=True,
    )
    own: dict[str, float] = defaultdict(float)
    for line in done.stderr.splitlines():
        if found := re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", line):
            own[found[2].partition(".")[0]] += int(found[1]) / 1e6
    return dict(sorted(own.items(), key=lambda item: -item[1])[:SHOWN])


def _environment(checkout: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}


def main() -> None:
    """Measure and write the results."""
    sys.path.insert(0, str(ROOT))
    import tempfile

    from localfeat.run.summary import environment

    given = sys.argv[1:]
    rounds = next((int(a.partition("=")[2]) for a in given if a.startswith("rounds=")), 7)
    checkouts = [Path(a).resolve() for a in given if "=" not in a] or [ROOT]
    taken: dict[str, dict[str, list[tuple[float, float]]]] = {p: {c.name: [] for c in checkouts} for p in POINTS}
    with tempfile.TemporaryDirectory() as place:
        for number in range(rounds):
            for point, code in POINTS.items():
                for checkout in checkouts:
                    folder = f"{place}/{number}-{checkout.name}"
                    taken[point][checkout.name].append(measure(checkout, code, folder))
        profiles = {checkout.name: profile(checkout, f"{place}/{checkout.name}") for checkout in checkouts}
    rows = [
        {"point": point, "checkout": name, "wall": median(w for w, _ in times), "cpu": median(c for _, c in times)}
        for point, by_checkout in taken.items()
        for name, times in by_checkout.items()
    ]
    facts = environment()
    about = {key: facts[key] for key in ("versions", "hardware", "commit")}
    text = json.dumps({"about": about, "rounds": rounds, "rows": rows, "profiles": profiles}, indent=1)
    (RESULTS / "start_up.json").write_text(f"{text}\n")
    lines = ["| until | checkout | wall (s) | CPU (s) |\n|---|---|---|---|"]
    lines += [f"| {r['point']} | {r['checkout']} | {r['wall']:.2f} | {r['cpu']:.2f} |" for r in rows]
    for name, own in profiles.items():
        shares = ", ".join(f"{package} {seconds:.2f}" for package, seconds in own.items())
        lines.append(f"\nImports of a run in {name}, seconds of each package's own modules: {shares}.")
    lines.append(f"\nMedians of {rounds} rounds; torch {about['versions']['torch']}, {about['hardware']['cpu']}.")
    (RESULTS / "start_up.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

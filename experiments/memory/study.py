"""The memory of local learning: tables and plots from predictions on the meta device, and step times.

    python experiments/memory/study.py [paper bf16 ours depth large time] [--rounds 7] [--settings TEXT …] [--render]

Without the name of a part, all parts run. Results: experiments/memory/results/. ``--render`` rewrites tables and plots
from the existing figures. The study is described in experiments/memory/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch starts its threads
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script: the other files are experiments.memory.*

from experiments.memory import depth, large, ours, paper, step_times  # noqa: E402
from experiments.memory.plan import Plan  # noqa: E402
from localfeat.run.summary import environment  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
COMMAND = "python experiments/memory/study.py"

MEASURE: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "paper": lambda plan: paper.measure(plan, "32-true"),
    "bf16": lambda plan: paper.measure(plan, "bf16-mixed"),
    "ours": ours.measure,
    "depth": depth.measure,
    "large": large.measure,
    "time": step_times.measure,
}


def run(plan: Plan, parts: Sequence[str], results: Path) -> None:
    """Measure parts and write their results."""
    results.mkdir(parents=True, exist_ok=True)
    for part in parts:
        started = time.perf_counter()
        found = MEASURE[part](plan)
        facts = environment()
        about = {"command": f"{COMMAND} {part}", **{key: facts[key] for key in ("versions", "hardware", "commit")}}
        found = {"about": {**about, "seconds": round(time.perf_counter() - started, 1)}, **found}
        (results / f"{part}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print(f"{part}: {found['about']['seconds']:.0f} s", flush=True)


def render(results: Path) -> None:
    """Write the tables and plots of all parts that have been measured."""
    found = {part: load(results, part) for part in MEASURE}
    for part, content in found.items():
        if content is not None:
            (results / f"{part}.md").write_text(f"{markdown(part, content, found['time'])}\n{footer(content)}")
    for part, draw in (("ours", ours.plot), ("depth", depth.plot), ("time", step_times.plot)):
        content = found[part]
        if content is not None:
            draw(content, results)


def load(results: Path, part: str) -> dict[str, Any] | None:
    """Return the figures of a part; ``None`` if it has not been measured."""
    file = results / f"{part}.json"
    return cast("dict[str, Any]", json.loads(file.read_text())) if file.exists() else None


def markdown(part: str, found: dict[str, Any], times: dict[str, Any] | None) -> str:
    """Return the tables of a part; ``times`` holds the figures of the part time."""
    if part == "ours":
        return ours.render(found, times)
    renderers = {"depth": depth.render, "large": large.render, "time": step_times.render}
    return renderers.get(part, paper.render)(found)


def footer(found: dict[str, Any]) -> str:
    """Return the lines that say how the figures were made."""
    about = found["about"]
    versions, commit = about["versions"], about["commit"]
    made = f"commit {commit['id'][:10]}{' with changes' if commit['dirty'] else ''}" if commit else "no commit"
    return (
        f"\n`{about['command']}`: torch {versions['torch']}, timm {versions['timm']}, {about['hardware']['cpu']}, "
        f"{about['seconds']:.0f} s, {made}.\n"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="The memory of local learning: tables, plots, step times.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"some of {', '.join(MEASURE)}; none: all")
    parser.add_argument("--rounds", type=int, help="number of rounds in the part time")
    parser.add_argument("--settings", nargs="+", default=[], metavar="TEXT", help="time only cases with it in the key")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for figures, tables and plots")
    parser.add_argument("--render", action="store_true", help="measure nothing, only rewrite tables and plots")
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in MEASURE]
    if unknown:
        parser.error(f"there is no part {unknown[0]}: choose from {', '.join(MEASURE)}")
    try:
        plan = step_times.with_rounds(Plan(), arguments.rounds, arguments.settings)
    except ValueError as error:
        parser.error(str(error))
    if not arguments.render:
        run(plan, arguments.parts or list(MEASURE), arguments.results)
    render(arguments.results)


if __name__ == "__main__":
    main()

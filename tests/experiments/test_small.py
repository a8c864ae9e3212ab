"""The figures that pages quote from the small study match its runs' files."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "experiments" / "small" / "results" / "runs"
PAGES = [ROOT / "README.md", ROOT / "experiments" / "small" / "README.md"]


def accuracies() -> dict[tuple[str, int], dict[int, float]]:
    """Return (method, modules) -> seed -> test accuracy in %."""
    found: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for file in RUNS.glob("*/summary.json"):
        run = json.loads(file.read_text())
        found[run["method"], len(run["split"])][run["seed"]] = 100 * run["test_accuracy"]
    return found


def cell(method: str, modules: int, paired: bool) -> str:
    known = accuracies()
    if (method, modules) not in known:
        return "–"
    own, e2e = known[method, modules], known["e2e", 1]
    text = f"{mean(own.values()):.2f} ± {stdev(own.values()):.2f}"
    differences = [own[seed] - e2e[seed] for seed in own]
    error = stdev(differences) / len(differences) ** 0.5
    return text + (f" ({mean(differences):+.2f} ± {error:.2f})".replace("-", "−") if paired else "")


@pytest.mark.parametrize("page", PAGES, ids=["README", "small"])
def test_tables_of_pages(page: Path) -> None:
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([^|]+) \| ([^|]*)\|$", page.read_text(), re.M)
    rows = [row for row in rows if "±" in row[1] + row[2]]
    assert len(rows) == 7
    for method, two, four in rows:
        if method == "e2e":
            assert two.strip() == cell("e2e", 1, False) and not four.strip()
        else:
            paired = page != PAGES[0]
            assert [two.strip(), four.strip()] == [cell(method, 2, paired), cell(method, 4, paired)]


def test_all_jobs_are_there() -> None:
    jobs = json.loads((RUNS / "study.json").read_text())["jobs"]
    assert {job["name"] for job in jobs} == {file.parent.name for file in RUNS.glob("*/summary.json")}
    assert all(len(seeds) == 3 for seeds in accuracies().values())

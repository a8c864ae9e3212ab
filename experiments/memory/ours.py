"""Memory against work: local modules, lean computation and recomputation, and their strongest rival, accumulation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.memory import plots
from experiments.memory.cases import PRECISION_NAMES, Case, efficiencies, memory_row
from experiments.memory.composition import Composition
from experiments.memory.plan import Plan
from experiments.memory.search import front, within
from experiments.memory.tables import Row, cuts, find, gib, ratio, saved, saving, settings, table
from localfeat.memory.emulation import Precision

ACCUMULATED_MODULES = 4
TARGETS = {
    "balanced, K=4, nothing computed again": 66.0,
    "one block per module, nothing computed again": 72.0,
    "best local setting with no more work than E2E with checkpointing": 80.0,
}
"""Minimal saving against plain E2E in per cent, set before anything was measured."""


def measure(plan: Plan) -> dict[str, Any]:
    """Measure everything in every precision."""
    return {"network": plan.main.facts(), "precisions": {p: _in_precision(plan, p) for p in plan.precisions}}


def _in_precision(plan: Plan, precision: Precision) -> dict[str, Any]:
    composition = Composition(plan.main, precision)

    def row(case: Case) -> dict[str, Any]:
        if case.efficiency == efficiencies()["slices"] and case.cuts:  # whole steps would take minutes in these rows
            total = composition.total(case)
            return {**case.facts(), "peak_bytes": total.peak_bytes, "counted": "composition", **total.facts()}
        work = composition.work(case).facts()
        return {**memory_row(plan.main, case, precision), "counted": "step", **work}

    named = [efficiencies()[name] for name in plan.efficiencies]
    grid = [row(Case("e2e", efficiency=efficiency)) for efficiency in named]
    for method in plan.methods:
        for efficiency in named:
            grid += [row(composition.balanced(Case(method, efficiency=efficiency), k)) for k in plan.modules]
    parts = [plan.main.batch_size // size for size in plan.micro_batches]
    bases = [Case("e2e"), Case("e2e", efficiency=efficiencies()["lean"])]
    # With accumulation a contrastive loss compares only the images of one part, which makes it a different loss.
    bases.append(composition.balanced(Case("greedy_ce", efficiency=efficiencies()["lean"]), ACCUMULATED_MODULES))
    accumulated = [row(replace(base, accumulate=count)) for base in bases for count in parts]
    plain = grid[0]["flops"]
    limits = {f"{limit:.2f}": limit * plain for limit in plan.work_limits}
    limits["E2E + checkpointing"] = find(grid, method="e2e", efficiency_name="checkpoint")["flops"]
    budgets: list[dict[str, Any]] = [{"limit": name, "flops": flops, "rows": []} for name, flops in limits.items()]
    fronts = {}
    for method in ("e2e", *plan.methods):
        settings_found = front(composition, method, plan.ways)
        fronts[method] = [{"peak_bytes": s.peak_bytes, "flops": s.flops, **s.case.facts()} for s in settings_found]
        for budget in budgets:
            best = within(settings_found, budget["flops"] * (1 + 1e-9))
            budget["rows"] += [] if best is None else [row(best.case)]
    return {"grid": grid, "accumulated": accumulated, "budgets": budgets, "fronts": fronts}


def render(found: dict[str, Any], times: dict[str, Any] | None) -> str:
    """Render as Markdown; ``times``, the results of the part time, adds measured ratios where they exist."""
    network = found["network"]
    text = [f"## {network['label']}, {network['image_size']} px, batch {network['batch_size']}\n", _about_work(times)]
    for precision, part in found["precisions"].items():
        name = PRECISION_NAMES[precision]
        plain, ratios = part["grid"][0], measured(times)
        text += [f"## {name}\n", f"### Targets, {name}\n", targets(part)]
        text += [f"### Named settings, {name}\n", _table(part["grid"], plain, ratios)]
        text += [
            f"### Accumulation, {name}\n",
            "The same batch in parts that share one optimizer step. Gradients are those of the whole batch for E2E "
            "and cross entropy in networks without batch normalisation; a contrastive loss would see less.\n",
            _table(part["accumulated"], plain, ratios),
            f"### Least memory within a limit of work, {name}\n",
            "Found by searching over cuts, blocks computed again, and how.\n",
            _budget_table(part["budgets"], plain, ratios),
        ]
    return "\n".join(text)


def _about_work(times: dict[str, Any] | None) -> str:
    text = (
        "Work is floating-point operations of matrix products, convolutions and attention in one step, relative to "
        "plain E2E. It is not time: what only moves data (norms, activations, windows) counts nothing, so that "
        "`selective` and `lean` look free. Bytes are what all operations read and write, relative to plain E2E: an "
        "upper limit, since nothing is taken to stay in a cache. Memory comes from whole steps on the meta device, "
        "that of local modules with `slices` from sums over their pieces."
    )
    if times is None:
        return text + " Step times have not been measured yet (part `time`).\n"
    return text + (
        f" Time is measured on a CPU ({times['timed_batch']} images, bf16, see [time.md](time.md)), where there is "
        "a measurement of the same setting.\n"
    )


def measured(times: dict[str, Any] | None) -> dict[str, float]:
    """Return the step time relative to plain E2E by case."""
    return {} if times is None else {row["key"]: row["relative_to_e2e"] for row in times["rows"]}


def targets(part: dict[str, Any]) -> str:
    """Render the targets and which of them are met."""
    plain, local = part["grid"][0], [row for row in part["grid"] if row["method"] != "e2e"]
    again_not = [row for row in local if row["efficiency"]["recompute"] == "none"]
    most = max(len(row["cuts"]) for row in local)
    last = [row for row in part["budgets"][-1]["rows"] if row["method"] != "e2e"]
    candidates = [
        [row for row in again_not if len(row["cuts"]) == ACCUMULATED_MODULES - 1],
        [row for row in again_not if len(row["cuts"]) == most],
        last,
    ]
    lines = []
    for (name, wanted), rows in zip(TARGETS.items(), candidates, strict=True):
        if not rows:
            lines.append([name, *("–" for _ in range(5)), f"{wanted:.0f} %", "missed: there is no such setting"])
        for method in dict.fromkeys(row["method"] for row in rows):
            best = min((r for r in rows if r["method"] == method), key=lambda r: r["peak_bytes"])
            met = "met" if saved(best, plain) >= wanted else "missed"
            found = [cuts(best), settings(best), gib(best["peak_bytes"]), saving(best, plain)]
            lines.append([name, f"`{method}`", *found, f"{wanted:.0f} %", met])
    header = ["target", "method", "after blocks", "efficiency", "GiB", "under plain E2E", "wanted", ""]
    return table(header, lines)


def _cells(row: Row, plain: Row, ratios: dict[str, float]) -> list[str]:
    time = ratios.get(row["key"])
    return [
        f"`{row['method']}`",
        str(len(row["cuts"]) + 1),
        cuts(row),
        settings(row),
        gib(row["peak_bytes"]),
        saving(row, plain),
        ratio(row, plain),
        ratio(row, plain, "traffic"),
        "–" if time is None else f"{time:.2f}",
    ]


_HEADER = ["method", "K", "after blocks", "efficiency", "GiB", "under plain E2E", "work", "bytes", "time (CPU)"]


def _table(rows: list[Row], plain: Row, ratios: dict[str, float]) -> str:
    return table(_HEADER, [_cells(row, plain, ratios) for row in rows])


def _budget_table(budgets: list[dict[str, Any]], plain: Row, ratios: dict[str, float]) -> str:
    lines = [[b["limit"], *_cells(row, plain, ratios)] for b in budgets for row in b["rows"]]
    return table(["work at most", *_HEADER], lines)


def _doubled(row: Row) -> bool:
    """Return whether a point lies next to one with the same label."""
    return bool(row["method"] == "e2e" and row["efficiency_name"] != "none")


def plot(found: dict[str, Any], folder: Path) -> None:
    """Plot memory against work, one plot per precision."""
    for precision, part in found["precisions"].items():
        searched = [row for budget in part["budgets"] for row in budget["rows"]]
        plain = part["grid"][0]
        points = [
            plots.Point(
                row["flops"] / plain["flops"],
                row["peak_bytes"],
                row["method"],
                row["accumulate"],
                ""
                if row["accumulate"] == 1 or _doubled(row)
                else str(found["network"]["batch_size"] // row["accumulate"]),
            )
            for row in [*part["grid"], *part["accumulated"], *searched]
        ]
        network, name = found["network"], PRECISION_NAMES[precision]
        title = f"{network['label']}, {network['image_size']} px, batch {network['batch_size']}, {name}"
        axis = "work of a step relative to plain E2E (floating-point operations, not time)"
        plots.trade(points, title, axis, folder / f"work_{name}.png")

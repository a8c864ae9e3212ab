"""The largest batch of large networks on small devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.memory.cases import PRECISION_NAMES, Case, Network, efficiencies, memory_row
from experiments.memory.composition import Composition, Peaks
from experiments.memory.plan import Plan
from experiments.memory.tables import GIB, cuts, table
from localfeat.memory.emulation import Precision

METHOD = "feature_recon"
ACCUMULATED_PROBES = (2, 6)  # images per part


def measure(plan: Plan) -> dict[str, Any]:
    """Measure all networks in all precisions."""
    return {
        "budgets_gib": list(plan.budgets),
        "precisions": {p: [_network(plan, network, p) for network in plan.large] for p in plan.precisions},
    }


def _network(plan: Plan, network: Network, precision: Precision) -> dict[str, Any]:
    composition = Composition(network, precision)
    budgets = [round(budget * GIB) for budget in plan.budgets]
    rows = []
    for case in _cases(network, composition):
        peaks = composition.peaks(case, plan.probes)
        batches = [_largest(peaks, case, budget) for budget in budgets]
        rows.append({**case.facts(), **composition.work(case).facts()})
        rows[-1] |= {"batches": batches, "peak_bytes": [round(peaks.at(batch)) if batch else None for batch in batches]}
    accumulated = _accumulated(network, precision, budgets)
    return {
        "network": network.facts(),
        "standing_bytes": composition.costs(Case("e2e")).persistent.total,
        "rows": rows,
        "accumulated": accumulated,
    }


def _cases(network: Network, composition: Composition) -> list[Case]:
    known = efficiencies()
    blocks = sum(network.stage_depths())
    cases = [Case("e2e", efficiency=known[name]) for name in ("none", "lean", "checkpoint", "slices")]
    for name, modules in (
        ("none", 4),
        ("lean", 4),
        ("lean", blocks),
        ("selective", 4),
        ("slices", 4),
        ("slices", blocks),
    ):
        cases.append(composition.balanced(Case(METHOD, efficiency=known[name]), min(modules, blocks)))
    return cases


def _largest(peaks: Peaks, case: Case, budget: int) -> int:
    """Return the largest batch by interpolation; all slices of a batch have the same size."""
    batch = peaks.largest_batch(budget)
    batch -= batch % case.efficiency.slices
    least = 2 if case.method == METHOD else 1  # a contrastive loss needs two images
    return batch if batch >= least else 0


def _accumulated(network: Network, precision: Precision, budgets: list[int]) -> dict[str, Any]:
    """Return the largest part of accumulated E2E, lean, on the line through two whole steps, checked by a third."""
    case = Case("e2e", efficiency=efficiencies()["lean"], accumulate=2)

    def peak(part: int) -> int:
        return int(memory_row(replace(network, batch_size=2 * part), case, precision)["peak_bytes"])

    low, high = ACCUMULATED_PROBES
    at_low, at_high = peak(low), peak(high)
    slope = (at_high - at_low) / (high - low)
    batches, peaks = list[int](), list[int | None]()
    for budget in budgets:
        part = max(0, int((budget - at_low) / slope) + low)
        while part and peak(part) > budget:
            part -= 1
        batches.append(part)
        peaks.append(peak(part) if part else None)
    return {**case.facts(), "batches": batches, "peak_bytes": peaks}


def render(found: dict[str, Any]) -> str:
    """Render the results as Markdown."""
    text = []
    budgets = [f"{budget:g} GiB" for budget in found["budgets_gib"]]
    for precision, networks in found["precisions"].items():
        for item in networks:
            plain = item["rows"][0]
            lines = [
                [
                    f"`{row['method']}`",
                    str(len(row["cuts"]) + 1),
                    cuts(row),
                    row["efficiency_name"],
                    f"{row['flops'] / plain['flops']:.2f}",
                    *map(str, row["batches"]),
                ]
                for row in item["rows"]
            ]
            parts = [f"{n}, any batch" if n else "0" for n in item["accumulated"]["batches"]]
            lines.append(["`e2e`, accumulated parts of", "1", "–", "lean", "1.00", *parts])
            name = f"{item['network']['label']}, {PRECISION_NAMES[precision]}"
            persistent = item["standing_bytes"] / GIB
            text += [f"## {name}\n", f"Weights and optimizer states alone: {persistent:.2f} GiB.\n"]
            text += [table(["method", "K", "after blocks", "efficiency", "work", *budgets], lines)]
    text.append(
        "Largest number of images per step whose predicted peak on CUDA stays within the budget, to within one image: "
        "composed of pieces, on the line through two batch sizes; with slices a multiple of them. Work is relative to "
        "plain E2E. The device needs some memory besides: its context, kernels' workspaces, fragmentation. Cuts are "
        f"balanced for batches of {found['precisions'][precision][0]['network']['batch_size']}; `{METHOD}` has the "
        "decoder one_layer. Accumulated parts: from whole steps.\n"
    )
    return "\n".join(text)

"""How memory grows with the depth and width of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.memory import plots
from experiments.memory.cases import PRECISION_NAMES, Case, Network, efficiencies, memory_row
from experiments.memory.composition import Composition
from experiments.memory.plan import Plan
from experiments.memory.tables import GIB, cuts, find, gib, saving, table
from localfeat.memory.emulation import Precision

METHOD = "feature_recon"
LABELS = {
    "e2e none": "E2E",
    "e2e checkpoint": "E2E, checkpoint",
    "e2e slices": "E2E, slices",
    "k4 none": "local, K=4",
    "k4 slices": "local, K=4, slices",
    "blocks none": "local, one block per module",
    "blocks slices": "local, one block per module, slices",
}


def measure(plan: Plan) -> dict[str, Any]:
    """Measure all networks in all precisions."""
    return {
        "precisions": {p: [_network(network, p) for network in plan.depth] for p in plan.precisions},
    }


def _network(network: Network, precision: Precision) -> dict[str, Any]:
    composition = Composition(network, precision)
    known = efficiencies()
    blocks = sum(network.stage_depths())
    rows = []
    for label in LABELS:
        modules, efficiency = label.split()
        case = Case("e2e" if modules == "e2e" else METHOD, efficiency=known[efficiency])
        if modules != "e2e":
            case = composition.balanced(case, min(4, blocks) if modules == "k4" else blocks)
        rows.append({"setting": label, **_figures(network, case, precision, composition)})
    return {"network": network.facts(), "blocks": blocks, "rows": rows}


def _figures(network: Network, case: Case, precision: Precision, composition: Composition) -> dict[str, Any]:
    """Measure a whole step on the meta device; steps in slices take minutes in deep networks, so they are composed."""
    if case.efficiency.slices == 1:
        return {**memory_row(network, case, precision), "counted": "step", **composition.work(case).facts()}
    total = composition.total(case)
    return {**case.facts(), "peak_bytes": total.peak_bytes, "counted": "composition", **total.facts()}


def render(found: dict[str, Any]) -> str:
    """Render the results as Markdown."""
    text = []
    for precision, networks in found["precisions"].items():
        first = networks[0]["network"]
        header = ["network", "blocks", *(f"{label} (GiB)" for label in LABELS.values())]
        header += ["cuts of K=4", "K=4 under E2E", "one block per module under E2E", "slices: K=4 under E2E"]
        lines = []
        for item in networks:
            rows = {row["setting"]: row for row in item["rows"]}
            plain = rows["e2e none"]
            lines.append(
                [
                    item["network"]["label"],
                    str(item["blocks"]),
                    *(gib(rows[label]["peak_bytes"]) for label in LABELS),
                    cuts(rows["k4 none"]),
                    saving(rows["k4 none"], plain),
                    saving(rows["blocks none"], plain),
                    saving(rows["k4 slices"], rows["e2e slices"]),
                ]
            )
        text += [f"## {first['image_size']} px, batch {first['batch_size']}, {PRECISION_NAMES[precision]}\n"]
        text += [table(header, lines)]
    text.append(
        f"Local modules: `{METHOD}`, one_layer, balanced cuts. Last column: both with efficiency `slices`. Figures "
        "with slices are sums over pieces, the others come from whole steps.\n"
    )
    return "\n".join(text)


def plot(found: dict[str, Any], folder: Path) -> None:
    """Plot the peaks of all networks."""
    for precision, networks in found["precisions"].items():
        groups = {
            f"{item['network']['label']} ({item['blocks']} blocks)": {
                text: find(item["rows"], setting=label)["peak_bytes"] / GIB for label, text in LABELS.items()
            }
            for item in networks
        }
        first, name = networks[0]["network"], PRECISION_NAMES[precision]
        title = f"Growth with the network, {first['image_size']} px, batch {first['batch_size']}, {name}"
        plots.bars(groups, title, "predicted peak memory of a step on CUDA (GiB)", folder / f"depth_{name}.png")

"""The paper's memory column, and the effect of better cuts and lean computation on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

from experiments.memory.cases import PRECISION_NAMES, Case, efficiencies, memory_row
from experiments.memory.composition import Composition
from experiments.memory.plan import Plan
from experiments.memory.tables import Row, cuts, find, gib, saving, table
from localfeat.memory.emulation import Precision

PAPER_MB = 14769
"""Peak memory of E2E, Swin-T at 224 px: ``torch.cuda.max_memory_allocated`` over 1024²."""
PAPER_SAVING = {"paper, K=2": "36 %", "paper, K=4": "45 %"}
"""Saving of feature_recon against E2E."""
METHODS = ("image_recon", "feature_recon")


def measure(plan: Plan, precision: Precision) -> dict[str, Any]:
    """Measure all rows under the plan's efficiency settings."""
    composition = Composition(plan.main, precision)
    found: dict[str, Any] = {"network": plan.main.facts(), "precision": precision, "efficiency": {}}
    for name in plan.paper_efficiencies:
        rows = []
        for label, case in _cases(plan, composition, name):
            row = {"cut": label, **memory_row(plan.main, case, precision), **composition.work(case).facts()}
            rows.append({**row, "composed_bytes": composition.total(case).peak_bytes})
        found["efficiency"][name] = rows
    return found


def _cases(plan: Plan, composition: Composition, efficiency: str) -> Iterator[tuple[str, Case]]:
    chosen = efficiencies()[efficiency]
    yield "none", Case("e2e", efficiency=chosen)
    ends = list(accumulate(plan.main.stage_depths()))
    stages: dict[str, list[int]] = {"K=2": ends[1:2], "K=4": ends[:3]}
    for decoder in plan.decoders:
        for method in METHODS:
            case = Case(method, efficiency=chosen, decoder=decoder)
            for label, places in stages.items():
                at = replace(case, cuts=tuple(places))
                yield f"paper, {label}", replace(at, downsample="previous")
                yield f"before downsampling, {label}", at
            yield f"after block {ends[1] - 1}", replace(case, cuts=(ends[1] - 1,))
            for modules in (2, 4):
                yield f"best, K={modules}", composition.balanced(case, modules)


def render(found: dict[str, Any]) -> str:
    """Render the results as Markdown."""
    network, plain = found["network"], found["efficiency"]["none"][0]
    mib = plain["peak_bytes"] / 1024**2
    text = [
        f"## {network['label']}, {network['image_size']} px, batch {network['batch_size']}, "
        f"{PRECISION_NAMES[found['precision']]}\n",
        f"Plain E2E takes {gib(plain['peak_bytes'])} GiB ({mib:.0f} MiB; the paper reports {PAPER_MB} MB in fp32). "
        "Every figure comes from a whole training step on the meta device that behaves like CUDA. The paper's "
        "figures are of feature_recon.\n",
    ]
    for name, rows in found["efficiency"].items():
        text += [f"### Efficiency `{name}`\n", _table(rows, plain)]
    every = [row for rows in found["efficiency"].values() for row in rows]
    largest = max(abs(row["peak_bytes"] - row["composed_bytes"]) for row in every)
    text.append(
        f"The sum over separately measured pieces, with which cuts are searched, differs from the whole step by "
        f"{largest / 1024:.1f} KiB at most in these {len(every)} rows.\n"
    )
    return "\n".join(text)


def _table(rows: list[Row], plain: Row) -> str:
    header = ["method", "decoder", "cut", "after blocks", "GiB", "under plain E2E", "paper (fp32)"]
    header += ["under E2E of this table", "under image_recon", "largest module"]
    lines = []
    for row in rows:
        local = row["method"] != "e2e"
        rival = saving(row, find(rows, **{**_same(row), "method": "image_recon"})) if _compares(row) else "–"
        lines.append(
            [
                f"`{row['method']}`",
                row["decoder"] or "–",
                row["cut"] if local else "–",
                cuts(row),
                gib(row["peak_bytes"]),
                saving(row, plain),
                PAPER_SAVING.get(row["cut"], "–") if row["method"] == "feature_recon" else "–",
                saving(row, rows[0]) if local else "–",
                rival,
                str(row["hungriest"]) if local else "–",
            ]
        )
    return table(header, lines)


def _compares(row: Row) -> bool:
    return bool(row["method"] == "feature_recon")


def _same(row: Row) -> dict[str, Any]:
    """Return the values that the image_recon row to compare with must share; best cuts may differ."""
    return {"decoder": row["decoder"], "cut": row["cut"]}

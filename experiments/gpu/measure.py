"""Memory, step times and accuracy on a GPU within a few minutes; see run.sh, which calls this.

Each part has a share of the time and ends when that is over; its table says how much of it was done. Results:
<results>/{memory,steps,accuracy}.{json,md}, rewritten after every row.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script: the other files are experiments.*

from experiments.gpu import accuracy, memory, steps  # noqa: E402
from experiments.memory.cases import Case, Network, efficiencies  # noqa: E402
from localfeat.run.command_line import one_line_errors, parse_arguments  # noqa: E402
from localfeat.run.summary import environment  # noqa: E402
from localfeat.utils.errors import UserError  # noqa: E402

SWIN = "swin_tiny_patch4_window7_224"
MICRO = (
    *(("patch_size", 4), ("window_size", 4), ("embed_dim", 16)),
    *(("depths", (1, 1, 1, 1)), ("num_heads", (1, 1, 2, 2))),
)
SHARES = {"memory": 0.40, "steps": 0.65, "accuracy": 1.0}
"""The share of the time after which a part ends."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        network: the network of memory and step times.
        memory: the cases whose memory is predicted and measured, in fp32 and bf16.
        timed: the cases whose steps are timed; the first is the reference.
        rounds: the largest number of timed rounds.
        runs: overrides of the accuracy runs, without those of the data.
        epochs, seeds: the largest numbers of epochs and of seeds of accuracy runs.
    """

    network: Network
    memory: tuple[Case, ...]
    timed: tuple[Case, ...]
    rounds: int
    runs: tuple[str, ...]
    epochs: int
    seeds: int


def full() -> Plan:
    """Return the paper's table, and the ways to save memory whose time is compared, on Swin-T at batch 128."""
    known = efficiencies()
    paper = tuple(
        Case(method, cuts, decoder=decoder)
        for method in ("image_recon", "feature_recon")
        for decoder in ("interp", "one_layer", "deconv")
        for cuts in ((4,), (2, 4, 10))
    )
    timed = (
        Case("e2e"),
        Case("e2e", efficiency=known["checkpoint"]),
        Case("e2e", accumulate=8),
        Case("feature_recon", (4,)),
        Case("feature_recon", (2, 4, 10)),
        Case("feature_recon", (1, 2, 5), known["lean"]),
        Case("feature_recon", (5, 7, 9), known["slices"]),
    )
    return Plan(Network("Swin-T", SWIN), (Case("e2e"), *paper), timed, 20, (), 100, 10)


def small() -> Plan:
    """Return the same on networks of a CPU's size."""
    plan = full()
    network = Network("micro Swin", SWIN, image_size=32, batch_size=8, arguments=MICRO)
    cut = {(4,): (2,), (2, 4, 10): (1, 2, 3), (1, 2, 5): (1, 2, 3), (5, 7, 9): (1, 2, 3)}
    memory, timed = (
        tuple(replace(case, cuts=cut.get(case.cuts, case.cuts)) for case in cases)
        for cases in (plan.memory, plan.timed)
    )
    runs = [f"trainer.limit_{split}_batches=2" for split in ("train", "val", "test")]
    return Plan(network, memory[:3], timed, 2, ("batch_size=8", *runs), 1, 1)


def written(rows: Iterable[dict[str, Any]], render: Callable[[list[dict[str, Any]]], str], file: Path) -> None:
    """Write all rows, and the table of them, after each."""
    facts = environment()
    about = {key: facts[key] for key in ("versions", "hardware", "commit")}
    found: list[dict[str, Any]] = []
    for row in rows:
        found.append(row)
        file.with_suffix(".json").write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")
        device = about["hardware"]["gpu"] or about["hardware"]["cpu"]
        closing = f"torch {about['versions']['torch']}, {device}, commit {(about['commit'] or {}).get('id')}"
        file.with_suffix(".md").write_text(f"{render(found)}\n{closing}\n")
        print(file.stem, {key: row[key] for key in ("key", "precision") if key in row}, flush=True)


def main() -> None:
    """Run the command line."""
    own = {"minutes": "9", "data": None, "results": None, "small": "false", "spent": "0"}
    arguments = parse_arguments(__doc__ or "", own)
    started = time.monotonic() - float(arguments["spent"])
    seconds = 60 * float(arguments["minutes"])
    cuda = torch.cuda.is_available()
    if not cuda and arguments["small"] != "true":
        raise UserError("this torch finds no GPU to use; small=true rehearses on the CPU")
    device, plan = "cuda" if cuda else "cpu", small() if arguments["small"] == "true" else full()
    results = Path(arguments["results"] or Path(__file__).parent / "results")
    results.mkdir(parents=True, exist_ok=True)

    def left(part: str) -> float:
        return started + SHARES[part] * seconds - time.monotonic()

    written(memory.rows(plan.network, plan.memory, device, lambda: left("memory")), memory.render, results / "memory")
    timed = steps.rows(plan.network, plan.timed, plan.rounds, device, lambda: left("steps"))
    written(timed, steps.render, results / "steps")
    runs = [*accuracy.data(arguments["data"]), f"trainer={'gpu' if cuda else 'cpu'}", *plan.runs]
    found = accuracy.rows(runs, plan.epochs, plan.seeds, lambda: left("accuracy"))
    written(found, accuracy.render, results / "accuracy")
    print(f"{time.monotonic() - started:.0f} s of {seconds:.0f}", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()

"""A small version of every part of the memory study; every figure of its tables is recomputed from its JSON."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from experiments.memory import study
from experiments.memory.cases import Case, Network, described, efficiencies, memory_row, mixed
from experiments.memory.composition import Composition
from experiments.memory.plan import Plan
from experiments.memory.search import Found, Way, front, pareto, within
from experiments.memory.step_times import chosen
from localfeat import Efficiency
from tests.helpers.small import FAMILIES

GIB = 1024**3
PARTS = ["paper", "ours", "depth", "large", "time"]  # bf16 is like paper
SWIN = Network("Swin", FAMILIES["swin"][0], 32, 16, drop_path_rate=0.1, arguments=tuple(FAMILIES["swin"][1].items()))
VIT = replace(SWIN, label="ViT", name=FAMILIES["vit"][0], arguments=tuple(FAMILIES["vit"][1].items()))
SHALLOW = replace(VIT, arguments=tuple({**FAMILIES["vit"][1], "depth": 2}.items()))
PLAN = Plan(
    main=VIT,  # the cheapest on the meta device; the paper's cuts need stages
    methods=("greedy_ce",),
    decoders=("one_layer",),
    precisions=("32-true",),
    efficiencies=("none", "checkpoint"),
    paper_efficiencies=("none",),
    modules=(4,),
    micro_batches=(8,),
    ways=(Way("checkpoint", 2),),
    work_limits=(1.2,),
    depth=(SHALLOW,),
    large=(SHALLOW,),
    budgets=(0.02,),
    probes=(128, 256),
    timed=(Case("e2e"), Case("e2e", accumulate=2), Case("feature_recon", (1, 2), mixed([1], slices=2))),
    timed_batch=4,
    rounds=2,
)

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]  # all parts run in the first test's setup


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    study.run(replace(PLAN, main=SWIN), ["paper"], folder)
    study.run(PLAN, PARTS[1:], folder)
    study.render(folder)
    return folder


def figures(results: Path, part: str) -> Any:
    return json.loads((results / f"{part}.json").read_text())


def lines(results: Path, part: str, header: str = "") -> list[dict[str, str]]:
    """Return the rows, as dicts, of the tables whose header contains the text."""
    found: list[dict[str, str]] = []
    columns: list[str] = []
    for line in (results / f"{part}.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            columns = []
        elif not columns:
            columns = unique(cells)
        elif not set(line) <= set("|- ") and header in " | ".join(columns):
            found.append(dict(zip(columns, cells, strict=True)))
    return found


def unique(names: list[str]) -> list[str]:
    return [f"{name} {names[:i].count(name) + 1}" if name in names[:i] else name for i, name in enumerate(names)]


def percent(row: Any, reference: Any) -> str:
    value = 100 - 100 * row["peak_bytes"] / reference["peak_bytes"]
    return f"{round(value, 1) + 0.0:.1f} %"


def gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def test_the_papers_table(results: Path) -> None:
    found = figures(results, "paper")["efficiency"]
    rows = found["none"]
    table = lines(results, "paper")
    assert len(table) == len(rows) == 1 + 2 * 7
    by_group = {id(row): group for group in found.values() for row in group}
    for row, line in zip(rows, table, strict=True):
        group = by_group[id(row)]
        assert line["GiB"] == gib(row["peak_bytes"]) == gib(max(row["modules"] or [0]))
        assert line["under plain E2E"] == percent(row, found["none"][0])
        assert line["under E2E of this table"] == ("–" if row["method"] == "e2e" else percent(row, group[0]))
        if row["method"] == "feature_recon":
            rival = next(r for r in group if r["method"] == "image_recon" and r["cut"] == row["cut"])
            assert line["under image_recon"] == percent(row, rival)
        assert abs(row["peak_bytes"] - row["composed_bytes"]) <= 16 * 1024
    cuts = {row["cut"]: row["cuts"] for row in found["none"] if row["method"] == "feature_recon"}
    assert cuts["paper, K=2"] == [2] and cuts["paper, K=4"] == [1, 2, 3] and cuts["after block 1"] == [1]


def test_the_table_of_named_and_accumulated_settings(results: Path) -> None:
    for precision, part in figures(results, "ours")["precisions"].items():
        name = {"32-true": "fp32", "bf16-mixed": "bf16"}[precision]
        text = (results / "ours.md").read_text()
        for kind, title in (("grid", "Named settings"), ("accumulated", "Accumulation")):
            section = text.split(f"### {title}, {name}")[1].split("### ")[0]
            rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
            assert len(rows) == len(part[kind])
            for row, cells in zip(part[kind], rows, strict=True):
                check_cells(cells, row, part["grid"][0])
    assert len(part["grid"]) == 2 + 2 and len(part["accumulated"]) == 3


def check_cells(cells: list[str], row: Any, plain: Any) -> None:
    assert cells[4:6] == [gib(row["peak_bytes"]), percent(row, plain)]
    assert cells[6:8] == [f"{row[what] / plain[what]:.2f}" for what in ("flops", "traffic")]


def test_the_table_of_least_memory_within_work(results: Path) -> None:
    part = figures(results, "ours")["precisions"]["32-true"]
    text = (results / "ours.md").read_text()
    section = text.split("### Least memory within a limit of work, fp32")[1].split("## ")[0]
    cells = [line.strip("|").split(" | ") for line in section.splitlines() if "| `" in line]
    rows = [(budget, row) for budget in part["budgets"] for row in budget["rows"]]
    for (budget, row), line in zip(rows, cells, strict=True):
        check_cells(line[1:], row, part["grid"][0])
        assert row["flops"] <= budget["flops"] * 1.000001
        front_of = part["fronts"][row["method"]]
        allowed = [s["peak_bytes"] for s in front_of if s["flops"] <= budget["flops"] * 1.000001]
        assert abs(row["peak_bytes"] - min(allowed)) <= 16 * 1024  # the best of its kind, by a whole step
    assert part["budgets"][-1]["flops"] == part["grid"][1]["flops"]  # E2E + checkpointing
    assert part["grid"][1]["key"] == "e2e, one_layer, uncut, checkpoint"


def test_targets_say_what_was_found(results: Path) -> None:
    part = figures(results, "ours")["precisions"]["32-true"]
    plain, table = part["grid"][0], lines(results, "ours", "wanted")
    assert len(table) == 3
    again_not = [r for r in part["grid"] if r["method"] != "e2e" and r["efficiency"]["recompute"] == "none"]
    best = min((r for r in again_not if len(r["cuts"]) == 3), key=lambda r: r["peak_bytes"])
    assert table[0]["GiB"] == gib(best["peak_bytes"]) and table[0]["under plain E2E"] == percent(best, plain)
    for line in table:
        enough = line["GiB"] != "–" and float(line["under plain E2E"][:-2]) >= float(line["wanted"][:-2])
        assert list(line.values())[-1].startswith("met" if enough else "missed")


def test_depth(results: Path) -> None:
    for networks in figures(results, "depth")["precisions"].values():
        rows = {row["setting"]: row for row in networks[0]["rows"]}
        assert rows["k4 none"]["cuts"] == [1] and rows["e2e slices"]["counted"] == "composition"
        assert rows["e2e checkpoint"]["peak_bytes"] < rows["e2e none"]["peak_bytes"]
    line = lines(results, "depth")[-1]
    assert line["E2E (GiB)"] == gib(rows["e2e none"]["peak_bytes"])
    assert line["K=4 under E2E"] == percent(rows["k4 none"], rows["e2e none"])
    assert line["slices: K=4 under E2E"] == percent(rows["k4 slices"], rows["e2e slices"])
    assert line["one block per module under E2E"] == percent(rows["blocks none"], rows["e2e none"])


def test_the_largest_batches_fill_the_budget(results: Path) -> None:
    item = figures(results, "large")["precisions"]["32-true"][0]
    budget = round(0.02 * GIB)
    for row in [item["rows"][0], item["rows"][-1], item["accumulated"]]:
        case = Case(row["method"], tuple(row["cuts"]), Efficiency(**row["efficiency"]), accumulate=row["accumulate"])
        batch = row["batches"][0]

        def peak(size: int, case: Case = case) -> int:
            network = replace(SHALLOW, batch_size=size * case.accumulate)
            return int(memory_row(network, case, "32-true")["peak_bytes"])

        tolerance = 0.05 * budget  # batches of a network this small are far from those that were measured
        assert batch > 1 and peak(batch) <= budget + tolerance
        assert peak(batch + row["efficiency"]["slices"]) > budget - tolerance
    table = lines(results, "large")
    assert [line["0.02 GiB"] for line in table[:2]] == [str(row["batches"][0]) for row in item["rows"][:2]]


def test_times_are_medians_of_ratios(results: Path) -> None:
    found = figures(results, "time")
    assert [len(found["rounds"]), len(found["rows"])] == [2, 3]
    for row, line in zip(found["rows"], lines(results, "time"), strict=True):
        ratio = median(own / before for own, before in (r[row["key"]] for r in found["rounds"]))
        assert line["time relative to plain E2E"] == f"{ratio:.2f}"
        fp32 = [{"peak_bytes": r["peak_bytes"]["32-true"]} for r in (row, found["rows"][0])]
        assert line["under plain E2E"] == percent(*fp32)
    known = lines(results, "ours", "time (CPU)")
    assert known[0]["time (CPU)"] == "1.00"  # a measured setting shows up among the others


def test_files(results: Path) -> None:
    names = {file.name for file in results.iterdir()}
    wanted = {f"{part}.{kind}" for part in PARTS for kind in ("json", "md")}
    wanted |= {f"{plot}_{name}.png" for plot in ("work", "depth", "time") for name in ["fp32"]}
    assert names == wanted
    for file in results.glob("*.[jm]*"):
        assert not re.search(r"/(home|root|tmp|work|usr)/", file.read_text()), file.name


def test_the_front_beats_everything_else_that_was_tried() -> None:
    found = [Found(Case("e2e"), peak, flops) for peak, flops in ((9, 1.0), (9, 1.1), (5, 1.2), (6, 1.3), (4, 1.4))]
    best = pareto(found)
    assert [(s.peak_bytes, s.flops) for s in best] == [(9, 1.0), (5, 1.2), (4, 1.4)]
    assert within(best, 1.3) == best[1] and within(best, 0.5) is None
    composition = Composition(VIT, "32-true")
    for setting in front(composition, "greedy_ce", PLAN.ways):
        assert composition.total(setting.case)[:2] == (setting.peak_bytes, setting.flops)
        assert len(setting.case.cuts) >= 1


def test_settings_are_those_of_the_configuration_and_named_in_words() -> None:
    known = efficiencies()
    assert known["slices"] == Efficiency(
        fused_attention=True, loss_slices=8, recompute="checkpoint", slices=8, fused_mlp=True
    )
    assert [described(e) for e in known.values()] == list(known)
    assert described(mixed([1, 2, 3, 7], slices=4)) == "4 slices in blocks 1–3, 7"
    assert described(mixed(None, slices=2)) == "2 slices in all blocks"


def test_a_part_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["study.py", "papers"])
    with pytest.raises(SystemExit):
        study.main()
    assert "there is no part papers: choose from paper, bf16, ours" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nonsense"):
        chosen(PLAN.timed, ["nonsense"])
    assert len(chosen(PLAN.timed, ["feature"])) == 2

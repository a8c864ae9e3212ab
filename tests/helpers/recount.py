"""Recompute every figure of a report from config.yaml, summary.json and metrics.csv, by independent code.

An unknown column, sentence or CSV field fails, so that everything printed has a check.
"""

from __future__ import annotations

import csv
import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from localfeat.run.build import build_learner
from localfeat.run.configuration import RunConfiguration
from localfeat.run.folder import RunFolder
from tests.helpers.documents import Cells, Document

PAPER = {  # SPEC's tables, copied by hand: (accuracy, memory saved)
    ("cifar10", "e2e", 1): (91.37, None),
    ("cifar10", "image_recon", 4): (83.38, 38),
    ("cifar10", "feature_recon", 4): (86.28, 45),
}
PAPER_PRETRAINED = {("cifar10", "feature_recon", 2): (None, 36)}
NO_NUMBER = "–"


@dataclass(frozen=True)
class Raw:
    """The content of a run's files."""

    folder: Path

    @functools.cached_property
    def config(self) -> Any:
        return OmegaConf.load(self.folder / "config.yaml")

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found

    @functools.cached_property
    def metrics(self) -> list[dict[str, str]]:
        with (self.folder / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def logged(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.metrics if row.get(name)]

    @property
    def accuracy(self) -> float:
        return self.logged("test/accuracy")[0] if self.config.test else max(self.logged("val/accuracy"))

    @property
    def modules(self) -> int:
        return 1 if self.config.method.name == "e2e" else int(self.config.split.modules)

    @property
    def paper(self) -> tuple[float | None, float | None]:
        known = PAPER_PRETRAINED if self.config.backbone.pretrained else PAPER
        own = self.config.backbone
        if own.name != "swin_tiny_patch4_window7_224" or own.arguments or self.config.image_size != 224:
            return None, None
        return known.get((self.config.dataset.source, self.config.method.name, self.modules), (None, None))


@dataclass(frozen=True)
class World:
    """A report's folder, and the runs that each row ("<table's title> / <row's label>") must be made of."""

    report: Path
    rows: dict[str, list[Path]]

    @functools.cached_property
    def content(self) -> dict[str, dict[str, list[Raw]]]:
        """Title -> label -> runs, in the tables' order."""
        found: dict[str, dict[str, list[Raw]]] = {}
        for name, folders in self.rows.items():
            title, label = name.split(" / ")
            found.setdefault(title, {})[label] = [Raw(folder) for folder in folders]
        return found

    def tables(self) -> dict[str, dict[str, list[Raw]]]:
        """The content of :attr:`content`, by title."""
        return self.content

    @property
    def runs(self) -> list[Raw]:
        return [run for rest in self.content.values() for runs in rest.values() for run in runs]

    @functools.cached_property
    def names(self) -> list[str]:
        """The :func:`known_strings`, longest first."""
        return sorted(known_strings(self), key=len, reverse=True)


Runs = Sequence[Raw]
Rest = dict[str, list[Raw]]


def mean(runs: Runs) -> float:
    return float(np.mean([run.accuracy for run in runs]))


def baseline(rest: Rest) -> Runs | None:
    return next((runs for runs in rest.values() if runs[0].config.method.name == "e2e"), None)


def _versus(runs: Runs, rest: Rest) -> float | None:
    other = baseline(rest)
    return None if other is None or other[0].folder == runs[0].folder else 100 * (mean(runs) - mean(other))


def peak(runs: Runs) -> int:
    return max(int(run.summary["peak_memory_bytes"]) for run in runs)


def saved(runs: Runs, rest: Rest) -> float | None:
    other = baseline(rest)
    return None if other is None or other[0].folder == runs[0].folder else 100 - 100 * peak(runs) / peak(other)


def speed(runs: Runs) -> float:
    """Return the median speed over seeds, from metrics.csv (median over epochs) for real runs."""
    own = [run.logged("speed/images_per_second") or [run.summary["images_per_second"]] for run in runs]
    return float(np.median([np.median(values) for values in own]))


# --- cells ---


def close(text: str, value: float | None, unit: str = "") -> bool:
    """Return whether ``text`` is ``value`` rounded to the digits of ``text``."""
    if value is None:
        return text == NO_NUMBER
    text = text.removesuffix(unit).strip().replace("−", "-").replace(",", "")
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5000001 * 10**-digits and len(text) >= 1


def _accuracy(text: str, runs: Runs, rest: Rest) -> bool:
    found = re.fullmatch(r"(\d+\.\d\d)(?: ± (\d+\.\d\d) \((\d+)\))?", text)
    assert found, text
    values = [run.accuracy for run in runs]
    if len(runs) == 1:
        return close(found[1], 100 * mean(runs)) and found[2] is None
    std = 100 * float(np.std(values, ddof=1))
    return close(found[1], 100 * mean(runs)) and close(found[2], std) and int(found[3]) == len(runs)


def _parameters(text: str, runs: Runs, rest: Rest) -> bool:
    units = {"M": 10**6, "k": 10**3, "": 1}
    counts = runs[0].summary["parameters"]
    parts = [re.fullmatch(r"([\d.]+) ?(\w?)", part) for part in text.split(" + ")]
    found = [part and close(part[1], count / units[part[2]]) for part, count in zip(parts, _both(counts), strict=True)]
    return all(found)


def _both(counts: dict[str, int]) -> list[int]:
    return [counts["backbone"], *([counts["auxiliary"]] if counts["auxiliary"] else [])]


def _published_memory(text: str, runs: Runs, rest: Rest) -> bool:
    return close(text, runs[0].paper[1], "%")


@functools.cache
def _flops(folder: Path) -> float | None:
    """FLOPs of an image by torch's own counter over a real step; ``None`` for runs that were only written."""
    run = Raw(folder)
    if not run.summary.get("classes"):
        return None
    configuration = RunConfiguration.from_values(RunFolder(folder).read_config())
    learner, size = build_learner(configuration, len(run.summary["classes"])), configuration.batch_size
    batch = torch.randn(size, 3, *[configuration.image_size] * 2), torch.arange(size) % 2
    with FlopCounterMode(display=False) as counter:
        learner.train_modules(lambda: batch, torch.Tensor.backward, lambda index: None)
    return counter.get_total_flops() / size


def flops(runs: Runs) -> float | None:
    return _flops(runs[0].folder)


def relative_flops(runs: Runs, rest: Rest) -> float | None:
    whole = [found for label, own in rest.items() if label.startswith("e2e") and (found := flops(own)) is not None]
    found = flops(runs)
    return None if not whole or found is None else found / min(whole)


CELLS: dict[str, Callable[[str, Runs, Rest], bool]] = {
    "K": lambda text, runs, rest: int(text) == runs[0].modules == len(runs[0].summary["split"]),
    "accuracy %": _accuracy,
    "vs e2e, points": lambda text, runs, rest: close(text, _versus(runs, rest)),
    "memory GiB": lambda text, runs, rest: close(text, peak(runs) / 2**30),
    "under e2e": lambda text, runs, rest: close(text, saved(runs, rest), "%"),
    "FLOPs": lambda text, runs, rest: close(text, relative_flops(runs, rest), "×"),
    "images/s": lambda text, runs, rest: close(text, speed(runs)),
    "parameters": _parameters,
    "epochs": lambda text, runs, rest: {int(text)} == {run.summary["epochs"] for run in runs},
    "published %": lambda text, runs, rest: close(text, runs[0].paper[0]),
    "vs published, points": lambda text, runs, rest: close(
        text, None if runs[0].paper[0] is None else 100 * mean(runs) - runs[0].paper[0]
    ),
    "published memory": _published_memory,
}


def check_document(document: Document, world: World) -> None:
    """Check every cell of every table, and every number in the other text."""
    tables = world.tables()
    assert len(document.tables) == len(tables)
    for cells, rest in zip(document.tables, tables.values(), strict=True):
        check_table(cells, rest)
    for text in document.prose:
        check_text(text, world)


def check_table(cells: Cells, rest: Rest) -> None:
    headings, rows = cells[0], cells[1:]
    assert len(rows) == len(rest)
    for number, (row, (label, runs)) in enumerate(zip(rows, rest.items(), strict=True), start=1):
        assert row[0] == str(number)
        assert re.fullmatch(rf"{re.escape(label)} ?([a-z](,[a-z])*)?", row[1]), row[1]
        for heading, text in zip(headings[2:], row[2:], strict=True):
            assert CELLS[heading](text, runs, rest), (label, heading, text)


# --- other text ---


def known_strings(world: World) -> set[str]:
    """Return names with digits that are not measurements, as they occur in the runs' files."""
    found = {
        *world.tables(),
        "TRGL (NeurIPS 2023), Table 4",
        "(arXiv 2212.14215)",
        "2^30",
        "top-1",
        "K=4",
    }
    for run in world.runs:
        summary = run.summary
        found |= {summary["commit"]["id"][:10], str(summary["hardware"]["cpu"]), str(summary["command"])}
        found |= {" ".join(["python -m localfeat.run", *summary["overrides"]]), str(summary["hardware"]["gpu"])}
        found |= {f"{name} {value}" for name, value in summary["versions"].items()}
        found |= {f"version: {value}" for value in summary["versions"].values()}
        found |= {f"table: {value}" for value in summary["versions"].values()}
    study = json.loads((world.rows[next(iter(world.rows))][0].parent / "study.json").read_text())
    return found | {f"{study['name']}: {job['name']}" for job in study["jobs"]} | {"1 GiB is 2^30 bytes"}


def check_text(text: str, world: World) -> None:
    """Assert that every number in ``text`` is part of a known name or of a sentence with recomputed figures."""
    for known in world.names:
        text = text.replace(known, "")
    for pattern, check in SENTENCES.items():
        for found in re.finditer(pattern, text):
            assert check(found, world), found[0]
        text = re.sub(pattern, "", text)
    text = re.sub(r"^\s*\d+\. ", "", text)  # numbered list
    text = re.sub(r"e2e|feature_recon|\d_(memory|curves|depth|weights)", "", text)
    assert not re.search(r"\d", text), text


def _seed(found: re.Match[str], world: World) -> bool:
    return any(run.config.seed == int(found[1]) and close(found[2], 100 * run.accuracy) for run in world.runs)


def _counted(found: re.Match[str], world: World) -> bool:
    seeds = [int(seed) for seed in found[2].split(", ")]
    tables = [[run for runs in rest.values() for run in runs] for rest in world.tables().values()]
    return any(len(t) == int(found[1]) and sorted({run.config.seed for run in t}) == seeds for t in tables)


def _progress(found: re.Match[str], world: World) -> bool:
    study = world.rows[next(iter(world.rows))][0].parent
    jobs = [job["name"] for job in json.loads((study / "study.json").read_text())["jobs"]]
    done = [job for job in jobs if (study / job / "summary.json").exists()]
    return [int(n) for n in found.groups()] == [len(world.runs), len(done), len(jobs)]


def _setting(found: re.Match[str], world: World) -> bool:
    """Return whether a ``key=value`` is that of some run."""
    values = [OmegaConf.select(run.config, found[1]) for run in world.runs]
    shown = [str(list(v) if OmegaConf.is_list(v) else v).replace(" ", "") for v in values if v is not None]
    return any(close(found[2], float(v)) if re.fullmatch(r"[\d.e-]+", v) else v == found[2] for v in shown)


def _other_seeds(found: re.Match[str], world: World) -> bool:
    sets = {
        ", ".join(str(run.config.seed) for run in runs) for rest in world.tables().values() for runs in rest.values()
    }
    return {found[1], found[2]} <= sets


def _claim(found: re.Match[str], world: World) -> bool:
    """Check the claim on feature_recon over image_recon, pretrained, for equal decoders."""
    rest = next(rest for title, rest in world.tables().items() if title.endswith("pretrained=true"))
    pairs = [(rest[f"feature_recon decoder={d}"], rest[f"image_recon decoder={d}"]) for d in ("interp", "deconv")]
    if "accuracy" in found[1]:
        ours, bound = [100 * (mean(a) - mean(b)) for a, b in pairs], 0.58
    else:
        ours, bound = [100 * (1 - peak(a) / peak(b)) for a, b in pairs], 12.0
    low, high = found[2], found[3] or found[2]
    return close(low, min(ours)) and close(high, max(ours)) and int(found[4]) == 2 and close(found[5], bound)


SENTENCES: dict[str, Callable[[re.Match[str], World], bool]] = {
    r"seed (\d+): (\d+\.\d+) %": _seed,
    r"(\d+) runs?, seeds? ((?:\d+, )*\d+)": _counted,
    r"(\d+) runs, (\d+) of (\d+) jobs finished": _progress,
    r"compared over other seeds: ((?:\d+, )*\d+) here, ((?:\d+, )*\d+) end to end": _other_seeds,
    r"(points of accuracy|% of peak memory saved): here (\S+)(?: to (\S+))? \((\d+) pairs? of rows\), "
    r"published: at most (\S+)": _claim,
    r"([a-z_.0-9]+)=([^;<\s]*\d[^;<\s]*)": _setting,
    r"(\d+) threads?": lambda found, world: int(found[1]) in {run.summary["hardware"]["threads"] for run in world.runs},
}


# --- CSV ---

OF_RUN: dict[str, Callable[[Raw], Any]] = {
    "seed": lambda run: run.config.seed,
    "accuracy": lambda run: run.accuracy,
    "test_accuracy": lambda run: run.accuracy if run.config.test else None,
    "val_accuracy": lambda run: max(run.logged("val/accuracy")),
    "best_epoch": lambda run: max(
        i for i, v in enumerate(run.logged("val/accuracy")) if v == max(run.logged("val/accuracy"))
    ),
    "epochs": lambda run: len(run.logged("val/accuracy")),
    "batch_size": lambda run: run.config.batch_size,
    "precision": lambda run: run.config.trainer.precision,
    "peak_memory_bytes": lambda run: run.summary["peak_memory_bytes"],
    "images_per_second": lambda run: speed([run]),
    "seconds": lambda run: run.summary["seconds"],
    **{f"parameters_{n}": lambda run, n=n: run.summary["parameters"][n] for n in ("backbone", "auxiliary", "total")},
}

OF_ROW: dict[str, Callable[[Runs, Rest], Any]] = {
    "seeds": lambda runs, rest: " ".join(str(run.config.seed) for run in runs),
    "n": lambda runs, rest: len(runs),
    "accuracy_mean": lambda runs, rest: mean(runs),
    "accuracy_std": lambda runs, rest: float(np.std([r.accuracy for r in runs], ddof=1)) if len(runs) > 1 else None,
    "compared_with_row": lambda runs, rest: None if _versus(runs, rest) is None else 1,
    "points_to_e2e": _versus,
    "peak_memory_bytes": lambda runs, rest: peak(runs),
    "memory_saved": lambda runs, rest: None if saved(runs, rest) is None else saved(runs, rest) / 100,  # type: ignore
    "images_per_second": lambda runs, rest: speed(runs),
    "flops_per_image": lambda runs, rest: flops(runs),
    "relative_flops": relative_flops,
    "points_to_e2e_at_equal_flops": lambda runs, rest: None,
    "backbone_parameters": lambda runs, rest: runs[0].summary["parameters"]["backbone"],
    "auxiliary_parameters": lambda runs, rest: runs[0].summary["parameters"]["auxiliary"],
    "epochs": lambda runs, rest: runs[0].summary["epochs"],
    "published_accuracy": lambda runs, rest: None if runs[0].paper[0] is None else runs[0].paper[0] / 100,
    "points_to_published": lambda runs, rest: None if runs[0].paper[0] is None else 100 * mean(runs) - runs[0].paper[0],
    "published_memory_saved": lambda runs, rest: None if runs[0].paper[1] is None else runs[0].paper[1] / 100,
    "published_memory_mb": lambda runs, rest: None,
}

OF_PLACE: dict[str, Callable[[Raw], Any]] = {
    "dataset": lambda run: run.config.dataset.source,
    "split": lambda run: "test" if run.config.test else "validation",
    "backbone": lambda run: run.summary["backbone"],
    "image_size": lambda run: run.config.image_size,
    "method": lambda run: run.config.method.name,
    "modules": lambda run: run.modules,
    "blocks": lambda run: "+".join(map(str, run.summary["split"])),
    **{f"{n}_version": lambda run, n=n: run.summary["versions"][n] for n in ("python", "torch", "lightning", "timm")},
    "localfeat_version": lambda run: run.summary["versions"]["localfeat"],
    "torchvision_version": lambda run: run.summary["versions"].get("torchvision"),
    "memory_counted_by": lambda run: run.summary["peak_memory_source"],
}

AS_TEXT = ("study", "folder", "commit", "hardware", "notes", "published_source", "command", "title", "label")


def check_lines(lines: list[dict[str, str]], world: World, *, of_runs: bool) -> None:
    """Check every field of report.csv or runs.csv."""
    places = [
        (t, n, label, rest) for t, rest in enumerate(world.tables().values(), 1) for n, label in enumerate(rest, 1)
    ]
    expected = [(*place, [run]) for place in places for run in place[3][place[2]]] if of_runs else None
    expected = expected or [(*place, place[3][place[2]]) for place in places]
    assert len(lines) == len(expected)
    for line, (table, number, label, rest, runs) in zip(lines, expected, strict=True):
        assert (line.pop("table"), line.pop("row"), line["label"]) == (str(table), str(number), label)
        for name, text in line.items():
            if name in AS_TEXT:
                continue
            if name in OF_PLACE:
                value = OF_PLACE[name](runs[0])
            else:
                value = OF_RUN[name](runs[0]) if of_runs else OF_ROW[name](runs, rest)
            assert _same(text, value), (label, name, text, value)
        own = line["command"] in (
            runs[0].summary["command"],
            " ".join(["python -m localfeat.run", *runs[0].summary["overrides"]]),
        )
        assert own and (not of_runs or line["folder"].endswith(runs[0].folder.name))


def _same(text: str, value: Any) -> bool:
    if value is None:
        return text == ""
    return text == value if isinstance(value, str) else abs(float(text) - value) <= 1e-6 * max(1, abs(value))

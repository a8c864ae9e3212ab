"""report.csv, a line for each row, and runs.csv, a line for each run: figures as measured, not rounded."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from localfeat.studies.report.provenance import notes, provenance
from localfeat.studies.report.rows import Row, Table
from localfeat.studies.report.runs import Material, Run
from localfeat.studies.report.words import command
from localfeat.utils.sizes import as_size

Line = dict[str, Any]


def rows_csv(tables: Sequence[Table]) -> str:
    """Accuracies and shares from 0 to 1, differences in points, memory in bytes; what there is none of is empty."""
    return _csv([_row(table, row) for table in tables for row in table.rows])


def _row(table: Table, row: Row) -> Line:
    run, figures, found = row.runs[0], table.published(row), notes(table)
    other = table.baseline(row)
    return {
        **_place(table, row),
        "seeds": _joined(row.accuracy_of_seed),
        "n": len(row.accuracy_of_seed),
        "accuracy_mean": row.mean,
        "accuracy_std": row.std,
        "compared_with_row": None if other is None else other.number,
        "points_to_e2e": table.to_baseline(row),
        "peak_memory_bytes": row.peak_memory_bytes,
        "memory_saved": table.memory_saved(row),
        "images_per_second": row.images_per_second,
        "flops_per_image": row.flops,
        "relative_flops": table.relative_flops(row),
        "points_to_e2e_at_equal_flops": table.at_equal_flops(row),
        "backbone_parameters": row.parameters["backbone"],
        "auxiliary_parameters": row.parameters["auxiliary"],
        "epochs": _joined(row.epochs),
        "published_accuracy": None if figures.accuracy is None else figures.accuracy / 100,
        "points_to_published": table.to_published(row),
        "published_memory_saved": None if figures.memory_saved is None else figures.memory_saved / 100,
        "published_memory_mb": figures.memory_mb,
        "published_source": "; ".join(figures.sources),
        "notes": "; ".join(found.texts[sign] for sign in found.signs.get(row.number, "").split(",") if sign),
        **_of_runs(row),
        "command": command(run),
    }


def _place(table: Table, row: Row) -> Line:
    run = row.runs[0]
    return {
        "table": table.number,
        "title": table.title,
        "dataset": run.summary["dataset"],
        "split": table.split,
        "backbone": run.summary["backbone"],
        "image_size": as_size(run.config["image_size"]),
        "row": row.number,
        "label": row.label,
        "method": row.method,
        "modules": row.modules,
        "blocks": "+".join(map(str, run.blocks)),
    }


def _of_runs(row: Row) -> Line:
    """Commit, versions and hardware; different ones of a row's runs side by side."""
    own = [provenance(run) for run in row.runs]
    names = dict.fromkeys(name for found in own for name in found)
    return {_column(name): " and ".join(dict.fromkeys(f.get(name, "unknown") for f in own)) for name in names}


def _column(name: str) -> str:
    return name.replace(" ", "_")


def runs_csv(material: Material, tables: Sequence[Table]) -> str:
    """Every run with the row that it is part of; folders from the one that was given."""
    return _csv([_run(material, t, row, run) for t in tables for row in t.rows for run in row.runs])


def _run(material: Material, table: Table, row: Row, run: Run) -> Line:
    study = material.study_of(run)
    summary = run.summary
    return {
        **_place(table, row),
        "study": None if study is None else study.name,
        "folder": material.name_of(run.folder),
        "seed": run.seed,
        "accuracy": run.accuracy,
        **{name: summary.get(name) for name in MEASURED},
        **{f"parameters_{name}": summary["parameters"][name] for name in ("backbone", "auxiliary", "total")},
        **{_column(name): value for name, value in provenance(run).items()},
        "command": command(run),
    }


MEASURED = (
    "test_accuracy",
    "val_accuracy",
    "best_epoch",
    "epochs",
    "batch_size",
    "precision",
    "peak_memory_bytes",
    "images_per_second",
    "seconds",
)


def _joined(values: Sequence[int] | dict[int, float]) -> str:
    return " ".join(map(str, values))


def _csv(lines: Sequence[Line]) -> str:
    text = io.StringIO(newline="")
    names = dict.fromkeys(name for line in lines for name in line)
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()

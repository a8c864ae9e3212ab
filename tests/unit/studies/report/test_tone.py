"""Only differences beyond chance are coloured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from localfeat.studies.report.cells import VERSUS
from localfeat.studies.report.provenance import Notes
from localfeat.studies.report.rows import Row, Table


def row(*accuracies: float) -> Any:
    """A row of runs with seeds 0, 1, …"""
    runs = [SimpleNamespace(seed=seed, accuracy=accuracy) for seed, accuracy in enumerate(accuracies)]
    return Row(1, "", {}, cast(Any, tuple(runs)))


@pytest.mark.parametrize(
    ("own", "e2e", "text", "tone"),
    [
        ([0.52, 0.53, 0.54], [0.50, 0.51, 0.52], "+2.00", "better"),  # error √(2 · 0.01²/3) = 0.82 points
        ([0.51, 0.52, 0.53], [0.50, 0.51, 0.52], "+1.00", ""),
        ([0.48, 0.49, 0.50], [0.50, 0.51, 0.52], "−2.00", "worse"),
        ([0.60], [0.50, 0.51, 0.52], "+9.00", ""),  # of one seed nobody knows the spread
        ([0.60], [0.50], "+10.00", ""),
    ],
)
def test_differences_beyond_two_standard_errors(own: list[float], e2e: list[float], text: str, tone: str) -> None:
    table = SimpleNamespace(baseline=lambda _: row(*e2e), to_baseline=lambda r: 100 * (r.mean - row(*e2e).mean))
    cell = VERSUS.cell(cast(Table, table), row(*own), cast(Notes, None))
    assert (cell.text, cell.tone) == (text, tone)

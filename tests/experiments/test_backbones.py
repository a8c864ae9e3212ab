"""The table of backbones: small networks are examined again, and the committed table holds no unexplained row."""

from __future__ import annotations

import json
import re

import pytest

from experiments.backbones import families


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_network_is_cut_proven_and_trained(name: str) -> None:
    row = families.examine(name)
    assert row["blocks"] >= 4 and row["problems"] == row["steps"] == []
    predicted, counted = families.peaks(name, row["size"])
    assert predicted == pytest.approx(counted, abs=families.SCALARS)


@pytest.mark.slow
def test_a_network_that_cannot_be_cut_says_why() -> None:
    row = families.examine("crossvit_tiny_240")
    assert "blocks" not in row and row["refused"].startswith("cannot split this CrossVit: no two places")
    page = families.render({"timm": "1", "rows": {"crossvit.CrossVit": row}, "peaks": {}})
    assert "**0 are cut**" in page and re.search(r"^\| crossvit.CrossVit \| crossvit_tiny_240 \| cannot", page, re.M)


def test_the_page_is_made_of_the_committed_rows() -> None:
    known = json.loads((families.RESULTS / "families.json").read_text())
    assert (families.RESULTS / "families.md").read_text() == families.render(known)
    assert all("refused" in row or row["problems"] == [] for row in known["rows"].values())

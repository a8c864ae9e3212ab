"""Configurations of version 0.1 are read under the current names; those of others' classes are left alone."""

from __future__ import annotations

from typing import Any

import pytest

from localfeat.run.construct import construct
from localfeat.run.trust import current_group

OLD = {"_target_": "localfeat.objectives.Method", "name": "feature_recon", "local": True, "target": "features"}
E2E = {**OLD, "name": "e2e", "local": False, "target": None, "label_smoothing": 0.2}


def test_methods_of_the_paper() -> None:
    family = {"_target_": "localfeat.HeadAndDecoder", "name": "feature_recon", "reconstruct": "features"}
    assert current_group(OLD) == family
    whole = current_group(E2E)
    assert whole["name"] == "e2e" and whole["label_smoothing"] == 0.2 and "reconstruct" not in whole
    assert not construct(whole, "method").local


def test_a_decoder() -> None:
    old = {"_target_": "localfeat.objectives.InterpDecoder", "_partial_": True, "hidden_channels": None}
    assert current_group(old) == {"_target_": "localfeat.InterpDecoder", "_partial_": True}


@pytest.mark.parametrize(
    "values",
    [
        {"_target_": "mine.Mine", "target": 0.25, "local": False, "hidden_channels": 3},
        {"_target_": "localfeat.methods.auglocal.AugLocal", "target": 1},
        {"target": "features", "local": False},
    ],
)
def test_others_are_left_alone(values: dict[str, Any]) -> None:
    assert current_group(values) == values

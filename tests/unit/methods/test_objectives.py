"""What an objective must return: one line for the author of a method who returns something else."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from localfeat.methods.local_module import LocalModule
from localfeat.methods.objective import Objective
from localfeat.utils.errors import UserError
from tests.helpers.small import batch


class Own(Objective):
    def __init__(self, weights: dict[str, float], as_tuple: bool) -> None:
        super().__init__()
        self.weights, self.as_tuple = weights, as_tuple

    def forward(self, inputs: Tensor, outputs: Tensor, images: Tensor | None, labels: Tensor) -> Any:
        terms = {"size": outputs.square().mean(), "mean": outputs.mean()}
        return (terms, None) if self.as_tuple else terms


@pytest.mark.parametrize(
    ("weights", "as_tuple", "line"),
    [
        (
            {"size": 1.0, "mean": 1.0},
            False,
            r"^Own.forward returns dict: return \(terms, logits\), or \(terms, None\)$",
        ),
        ({"sise": 1.0, "mean": 1.0}, True, "^an objective's terms are size, mean, and its weights are of sise, mean$"),
        ({"size": 1.0}, True, "^an objective's terms are size, mean, and its weights are of size$"),
    ],
)
def test_wrong_results_are_named(weights: dict[str, float], as_tuple: bool, line: str) -> None:
    images, labels = batch(2)
    module = LocalModule(None, [nn.Conv2d(3, 3, 1)], Own(weights, as_tuple))
    with pytest.raises(UserError, match=line):
        module(images, images, labels)

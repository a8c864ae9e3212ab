"""One local module: consecutive blocks of the backbone and the objective that trains them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from localfeat.efficiency.recompute import BlockRunner, plainly
from localfeat.methods.objective import Objective
from localfeat.utils.errors import UserError


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return a module's loss: the sum of its terms, each times its weight."""
    # No product with 1: Inductor drops it, takes the loss for the detached term, and its gradient is gone.
    weighted = [value if weights[name] == 1 else weights[name] * value for name, value in terms.items()]
    return sum(weighted[1:], start=weighted[0])


class LocalOutput(NamedTuple):
    """The output of a local module. Only ``loss`` holds a graph: drop it after backward to free the graph."""

    features: Tensor  # detached: the next module's input
    loss: Tensor  # weighted sum of the terms, scalar
    terms: dict[str, Tensor]  # detached, unweighted, scalars
    logits: Tensor | None  # detached, (B, num_classes); from the final classifier only


class LocalModule(nn.Module):
    """Blocks of a backbone (the stem too, in the first module) with their objective.

    Args:
        stem: images -> input features of the first block; ``None`` in every module but the first.
        blocks: consecutive backbone blocks, run in order.
        objective: ``(inputs, outputs, images, labels) -> (terms, logits)`` with a ``weights`` mapping that has
            one factor per term.
        runners: how each block is computed, e.g. recomputed in the backward pass; ``None``: plainly.

    Raises:
        UserError: a method built something else than an objective.
    """

    def __init__(
        self,
        stem: nn.Module | None,
        blocks: Sequence[nn.Module],
        objective: nn.Module,
        runners: Sequence[BlockRunner] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise UserError(f"the method's build returns {type(objective).__name__}: return a localfeat.Objective")
        self.runners = list(runners or [plainly] * len(blocks))
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.objective = objective

    def body(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return input features of the first block (patch embeddings in module 1) and output features of the last."""
        inputs = x if self.stem is None else self.stem(x)
        outputs = inputs
        self.objective.passed(0, inputs)
        for number, (block, run) in enumerate(zip(self.blocks, self.runners, strict=True), start=1):
            outputs = run(block, outputs)
            self.objective.passed(number, outputs)
        return inputs, outputs

    def forward(self, x: Tensor, images: Tensor | None, labels: Tensor) -> LocalOutput:
        """Run the body and the objective; ``x`` is the previous module's detached output, or the images.

        Raises:
            UserError: the objective returns something else than terms that it has weights for, and logits.
        """
        objective = self.objective
        with objective.watch():
            inputs, outputs = self.body(x)
        found = objective(inputs.detach(), outputs, images, labels)
        if not isinstance(found, tuple) or len(found) != 2:
            name = type(objective).__name__
            raise UserError(f"{name}.forward returns {type(found).__name__}: return (terms, logits), or (terms, None)")
        terms, logits = found
        terms = {**terms, **objective.watched_terms()}
        if terms.keys() != objective.weights.keys():
            names = ", ".join(terms), ", ".join(objective.weights)
            raise UserError(f"an objective's terms are {names[0]}, and its weights are of {names[1]}")
        return LocalOutput(
            outputs.detach(),
            weighted_sum(terms, objective.weights),
            {name: value.detach() for name, value in terms.items()},
            None if logits is None else logits.detach(),
        )

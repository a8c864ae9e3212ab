"""The objectives of all modules of a split at once, with gradients across its cuts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, pairwise
from typing import TypeVar

from torch import Tensor, nn

from localfeat.methods.objective import ClassifierObjective, Objective, Terms
from localfeat.methods.site import Site

_T = TypeVar("_T")


class JointObjective(Objective):
    """The sum of the objectives of a split, each at its cut. Terms of the m-th, but the last, are named ``term_m``.

    Args:
        objectives: of all modules of the split, in order; the last has the classifier.
        sites: their places.
    """

    def __init__(self, objectives: Sequence[Objective], sites: Sequence[Site]) -> None:
        super().__init__()
        self.objectives = nn.ModuleList(objectives)
        self.edges = [0, *accumulate(len(site.blocks) for site in sites)]
        self.weights = _named([own.weights for own in objectives])
        self.uses_images = any(own.uses_images for own in objectives)
        self._features: dict[int, Tensor] = {}
        self._watches = False

    @property
    def tail(self) -> nn.Module:
        """The classifier."""
        last = self._own[-1]
        assert isinstance(last, ClassifierObjective)
        return last.tail

    @property
    def _own(self) -> list[Objective]:
        return [own for own in self.objectives if isinstance(own, Objective)]

    def passed(self, blocks: int, features: Tensor) -> None:
        """Keep the features at the cuts, in training, and let all objectives take note of those of their blocks."""
        for own, (start, stop) in zip(self._own, pairwise(self.edges), strict=True):
            if start <= blocks <= stop:
                own.passed(blocks - start, features)
        if self._watches and blocks in self.edges:
            self._features[blocks] = features

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Return a context that watches the body for all objectives."""
        self._features, self._watches = {}, True
        with ExitStack() as stack:
            for own in self._own:
                stack.enter_context(own.watch())
            try:
                yield
            finally:
                self._watches = False

    def watched_terms(self) -> Terms:
        """Return what the objectives watched."""
        return _named([own.watched_terms() for own in self._own])

    def forward(
        self, inputs: Tensor, outputs: Tensor, images: Tensor | None, labels: Tensor
    ) -> tuple[Terms, Tensor | None]:
        features, self._features = [self._features[edge] for edge in self.edges], {}  # they hold a graph
        found, logits = [], None
        for own, (before, after) in zip(self._own, pairwise(features), strict=True):
            terms, logits = own(before.detach(), after, images, labels)
            found.append(terms)
        return _named(found), logits

    def after_step(self) -> None:
        """Update the state of all objectives."""
        for own in self._own:
            own.after_step()


def _named(found: Sequence[Mapping[str, _T]]) -> dict[str, _T]:
    return {
        name if number == len(found) else f"{name}_{number}": value
        for number, terms in enumerate(found, start=1)
        for name, value in terms.items()
    }

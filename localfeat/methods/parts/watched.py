"""Figures of module outputs within a body, taken by hooks while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from localfeat.efficiency.autocast import without_autocast
from localfeat.methods.site import Site
from localfeat.utils.errors import UserError


class Watched:
    """Collects ``figure(output)`` of each module at every call, until :meth:`take`.

    Args:
        term: name of the term, the sum of the figures.
        modules: of the body (they stay the backbone's: nothing is registered).
        figure: of an output; a scalar with its graph.
    """

    def __init__(self, term: str, modules: Sequence[nn.Module], figure: Callable[[Tensor], Tensor]) -> None:
        self.term, self.modules, self.figure = term, tuple(modules), figure
        self._seen: list[Tensor] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the modules while the body runs."""
        self._seen = []
        hooks = [module.register_forward_hook(self._look) for module in self.modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def take(self) -> list[Tensor]:
        """Return what was seen, in the order of the calls, and forget it: it holds a graph."""
        seen, self._seen = self._seen, []
        return seen

    def _look(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._seen.append(self.figure(output))


def mean_square(branch: Tensor) -> Tensor:
    """Return ``mean(r²)`` over all axes, the batch's included, of a branch (B, …)."""
    with without_autocast(branch.device):
        return branch.float().square().mean()


def mean_square_of_copy(branch: Tensor) -> Tensor:
    """Return the same of a branch that is added to in place afterwards, as a ResNet's blocks do."""
    return mean_square(branch.clone())


def transport(site: Site, method: str) -> Watched:
    """Return what sums ``mean(r²)`` over the residual branches of the site's blocks (see :func:`branch_ends`)."""
    in_place = any(isinstance(block, BasicBlock | Bottleneck) for block in site.blocks)
    return Watched("transport", branch_ends(site, method), mean_square_of_copy if in_place else mean_square)


def branch_ends(site: Site, method: str) -> list[nn.Module]:
    """Return the modules of the site's blocks that end its residual branches, drop-path included.

    timm names them ``drop_path…``; a ResNet's block without drop-path ends its branch in its last BatchNorm.

    Raises:
        UserError: blocks that are recomputed, sliced or compiled: hooks see no graph there.
    """
    if not site.observable:
        raise UserError(
            f"method={method} reads residual branches, which efficiency.recompute, slices and compile hide: "
            "set efficiency=none or lean"
        )
    found = []
    for block in site.blocks:
        names = dict(block.named_modules())
        ends = [module for name, module in names.items() if name.split(".")[-1].startswith("drop_path")]
        if not ends and isinstance(block, BasicBlock | Bottleneck):
            ends = [names["bn3" if isinstance(block, Bottleneck) else "bn2"]]
        found += ends
    return found

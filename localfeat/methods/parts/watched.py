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


def transport(site: Site, method: str) -> Watched | None:
    """Return what sums ``mean(r²)`` over the residual branches of the site's blocks; ``None`` if they have none.

    Raises:
        UserError: blocks that are recomputed, sliced or compiled: hooks see no graph there; a network without branches.
    """
    if not site.observable:
        raise UserError(
            f"method={method} reads residual branches, which efficiency.recompute, slices and compile hide: "
            "set efficiency=none or lean"
        )
    ends = branch_ends(site.blocks)
    whole = len(site.blocks) + len(site.above) + 1 == len(site.shapes)
    if whole and not ends and not branch_ends(site.above):
        raise UserError(f"method={method} reads residual branches, and none are found in this backbone's blocks")
    in_place = any(isinstance(part, _OF_RESNET) for block in site.blocks for part in block.modules())
    return Watched("transport", ends, mean_square_of_copy if in_place else mean_square) if ends else None


def branch_ends(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules of these blocks that end their residual branches, drop-path included.

    timm names them ``drop_path…``; a ResNet's block without drop-path ends its branch in its attention over channels
    or, without it, in its last BatchNorm.
    """
    found = []
    for block in blocks:
        for name, module in block.named_modules():
            if name.split(".")[-1].startswith("drop_path"):
                called = getattr(block.get_submodule(name.rpartition(".")[0]), "has_skip", True)
                found += [module] if called else []
            elif isinstance(module, _OF_RESNET) and module.drop_path is None:
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                found.append(last if module.se is None else module.se)
    return found


_OF_RESNET = (BasicBlock, Bottleneck)  # they add to the branch in place

"""The blocks above a cut and the classifier, for objectives: copied, or read only. No gradient crosses a cut."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import cast

from torch import Tensor, nn
from torch.func import functional_call

from localfeat.backbones.parts import Chain
from localfeat.methods.site import Site


def picked(blocks: int, last: int, depth: int) -> list[int]:
    """Return ``depth`` block numbers, evenly spaced after block ``last``, the very last block included."""
    above = blocks - last - 1
    depth = min(depth, above)
    return [round(last + above / depth * i) for i in range(1, depth + 1)]


def path(site: Site, chosen: Collection[int]) -> Iterator[nn.Module]:
    """Yield the backbone's blocks of these numbers, and the layers between them that change the shape.

    Args:
        chosen: numbers in the whole backbone, from 0, all above the site.
    """
    first = len(site.shapes) - 1 - len(site.above)
    for number in range(first, max(chosen, default=-1) + 1):
        block = site.above[number - first]
        if number in chosen:
            yield block
        elif site.shapes[number] != site.shapes[number + 1]:
            yield from (block[at] for at in block.reshaping) if isinstance(block, Chain) else (block,)


def ahead(site: Site, depth: int) -> Iterator[nn.Module]:
    """Yield ``depth`` of the blocks above, evenly picked up to the very last, and what changes the shape between."""
    blocks = len(site.shapes) - 1
    return path(site, picked(blocks, blocks - len(site.above) - 1, depth))


def copied(module: nn.Module) -> nn.Module:
    """Return a trainable copy of a block or of the classifier, initialised with the original weights."""
    return copy.deepcopy(module).requires_grad_()


class ReadOnly(nn.Module):
    """A block or classifier of the backbone as it is at every call, without gradients to its parameters.

    Its statistics (BatchNorm) stay as they are. It registers nothing: the original belongs to another module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._original = (module,)

    def forward(self, features: Tensor) -> Tensor:
        """Return the original's output; the gradient reaches the features only."""
        original = self._original[0]
        state = {name: parameter.detach() for name, parameter in original.named_parameters()}
        state |= {name: buffer.clone() for name, buffer in original.named_buffers()}
        return cast(Tensor, functional_call(original, state, (features,)))

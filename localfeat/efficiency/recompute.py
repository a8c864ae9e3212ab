"""Block runners: run a block plainly, or recompute part of it in the backward pass to save memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from localfeat.efficiency.fused_mlp import activations_computed_again
from localfeat.efficiency.selective import run_selectively
from localfeat.efficiency.settings import Efficiency
from localfeat.efficiency.slices import refuse_slices, run_sliced
from localfeat.utils.errors import UserError

BlockRunner = Callable[[nn.Module, Tensor], Tensor]
"""``(block, features) -> features``: function that runs one block."""


def plainly(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block as it is."""
    return cast(Tensor, block(x))


def block_runners(blocks: Sequence[nn.Module], efficiency: Efficiency) -> list[BlockRunner]:
    """Return one runner per block of the backbone.

    Raises:
        UserError: a block number beyond the last block, or a block that cannot be computed in slices.
    """
    beyond = [number for number in efficiency.blocks or () if number > len(blocks)]
    if beyond:
        raise UserError(f"efficiency.blocks names block {beyond[0]}: this backbone has blocks 1 to {len(blocks)}")
    runner: BlockRunner = checkpointed if efficiency.recompute == "checkpoint" else selectively
    if efficiency.slices > 1:
        runner = partial(in_slices, slices=efficiency.slices)
        for index, block in enumerate(blocks):
            if efficiency.recomputes(index):
                refuse_slices(block, efficiency.slices)
    return [runner if efficiency.recomputes(i) else plainly for i in range(len(blocks))]


def builds_graph(block: nn.Module, x: Tensor) -> bool:
    """Return whether ``block(x)`` builds a graph for a backward pass."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in block.parameters()))


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block that keeps only its input; the backward pass recomputes the rest."""
    if not builds_graph(block, x):
        return plainly(block, x)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), StatisticsKept(block)

    # torch restores autocast and the random state, including the CPU's, which emulations use for the meta device.
    return cast(Tensor, checkpoint(block, x, use_reentrant=False, context_fn=contexts))


def in_slices(block: nn.Module, x: Tensor, *, slices: int) -> Tensor:
    """Run a block by :func:`localfeat.efficiency.slices.run_sliced` if it builds a graph."""
    return run_sliced(block, x, slices) if builds_graph(block, x) else plainly(block, x)


def selectively(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block by :func:`localfeat.efficiency.selective.run_selectively` if it builds a graph."""
    if not builds_graph(block, x):
        return plainly(block, x)
    with activations_computed_again():
        return run_selectively(block, x)


class StatisticsKept(AbstractContextManager[None]):
    """Context in which a block's batch normalisations update throw-away copies of their running statistics.

    The first computation has already updated the statistics, so a recomputation must not. Running without them would
    be simpler, but a recomputation has to save as many tensors as the first computation, which saves them too. May be
    entered again, as a graph may run backward again.
    """

    def __init__(self, block: nn.Module) -> None:
        self._norms = [m for m in block.modules() if isinstance(m, _NormBase) and m.training]
        self._kept: list[dict[str, Tensor]] = []

    def __enter__(self) -> None:
        self._kept = [{k: buffer for k, buffer in m._buffers.items() if buffer is not None} for m in self._norms]
        for norm, buffers in zip(self._norms, self._kept, strict=True):
            norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})

    def __exit__(self, *error: object) -> None:
        for norm, buffers in zip(self._norms, self._kept, strict=True):
            norm._buffers.update(buffers)
        self._kept = []

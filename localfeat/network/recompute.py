"""How the blocks of a local module are computed: plainly, or partly again in the backward pass to save memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from localfeat.efficiency import Efficiency
from localfeat.errors import UserError
from localfeat.network.local_module import BlockRunner, plainly
from localfeat.network.selective import run_selectively
from localfeat.network.sliced import refuse_slices, run_sliced
from localfeat.precision import AutocastState


def block_runners(blocks: Sequence[nn.Module], efficiency: Efficiency) -> list[BlockRunner]:
    """One runner per block of the backbone.

    Raises:
        UserError: a block number beyond the last block, a block that cannot be computed in slices.
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
    """Whether a backward pass will come for ``block(x)``."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in block.parameters()))


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block that keeps nothing but its input; its backward pass computes it again."""
    if not builds_graph(block, x):
        return plainly(block, x)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), Again(block, AutocastState.of(x.device))

    return cast(Tensor, checkpoint(block, x, use_reentrant=False, context_fn=contexts))


def in_slices(block: nn.Module, x: Tensor, *, slices: int) -> Tensor:
    """Run a block in slices of the batch, as :func:`localfeat.network.sliced.run_sliced`, if there is a graph."""
    return run_sliced(block, x, slices) if builds_graph(block, x) else plainly(block, x)


def selectively(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block that keeps no result of cheap operations, as :func:`localfeat.network.selective.run_selectively`."""
    return run_selectively(block, x) if builds_graph(block, x) else plainly(block, x)


class Again(AbstractContextManager[None]):
    """Around the second computation of a block: autocast as in the first, and the block's statistics left alone.

    Args:
        block: what is computed again.
        autocast: its state in the first computation. Torch restores that of real devices itself.
        inner: further contexts, entered last.
    """

    def __init__(
        self, block: nn.Module, autocast: AutocastState, *inner: AbstractContextManager[Any]
    ) -> None:  # entered once per backward pass through the same graph
        self._block = block
        self._autocast = autocast
        self._inner = inner
        self._stack = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._autocast.restored())
            stack.enter_context(statistics_kept(self._block))
            for context in self._inner:
                stack.enter_context(context)
            self._stack = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


@contextmanager
def statistics_kept(block: nn.Module) -> Iterator[None]:
    """Let normalisations over the batch update copies of their running statistics: the first time has counted.

    The copies are thrown away. Leaving the statistics out would be simpler, but the backward pass of a
    normalisation saves them, and a recomputation has to save as many tensors as the first computation did.
    """
    norms = [m for m in block.modules() if isinstance(m, _NormBase) and m.training]
    kept = [{name: buffer for name, buffer in norm._buffers.items() if buffer is not None} for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)

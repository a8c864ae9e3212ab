"""How the blocks of a local module are computed: plainly, or partly again in the backward pass to save memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from localfeat.efficiency import Efficiency
from localfeat.network.local_module import BlockRunner, plainly


def block_runners(blocks: Sequence[nn.Module], efficiency: Efficiency) -> list[BlockRunner]:
    """One runner per block of the backbone.

    Raises:
        UserError: a block number beyond the last block, a block that cannot be computed in slices.
    """
    return [plainly for _ in blocks]

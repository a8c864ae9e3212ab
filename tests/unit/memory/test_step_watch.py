"""The shares of a step that is worked out by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from localfeat.memory.step_watch import MemoryShares, StepWatch

BLOCK = 512


def blocks(number: int) -> Tensor:
    return torch.empty(number * BLOCK // 4, device="meta")


def test_two_modules_by_hand() -> None:
    """Module 1 peaks in its backward pass, module 2 in a temporary of its forward pass."""
    module = nn.Linear(BLOCK // 4, 1, bias=False, device="meta")  # 1 block
    watch = StepWatch([module.weight], [blocks(2)], (blocks(3), blocks(1)), host_too=False)
    held = watch.batch, watch._states  # as a trainer and its optimizers hold them
    watch.begin([])
    with watch.tracker:
        images = blocks(10)
        watch.module_begins()
        kept, scratch = blocks(20), blocks(5)
        del scratch
        watch.backward_begins()
        module.weight.grad = torch.empty_like(module.weight)
        scratch = blocks(7)
        del scratch, kept
        watch.has_gradients(module)
        features = blocks(4)
        module.weight.grad = None
        watch.module_begins()
        scratch = blocks(50)
        del scratch
        watch.backward_begins()
        del features
    first, second = watch.result().modules
    assert first == shares(weights=1, optimizer_state=2, gradients=1, activations=4 + 10 + 20, temporaries=7)
    # What module 1 made after its forward pass is no activation, whatever it is used for.
    assert second == shares(weights=1, optimizer_state=2, activations=4 + 10, temporaries=4 + 50)
    del held, images


def shares(**in_blocks: int) -> MemoryShares:
    return MemoryShares(**{name: number * BLOCK for name, number in in_blocks.items()})

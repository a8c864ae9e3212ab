"""The FLOPs of a step against torch's own counter over a real one."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from localfeat.efficiency.settings import Efficiency
from localfeat.memory.accounting import step_flops
from localfeat.methods.registry import METHODS
from tests.helpers.small import IMAGE_SIZE, batch, learner


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_of_a_real_step(method: str) -> None:
    model = learner(method, 4)
    counted = step_flops(model, batch_size=8, image_size=IMAGE_SIZE)
    with FlopCounterMode(display=False) as counter:
        model.train_modules(lambda: batch(8), Tensor.backward, lambda index: None)
    assert counted == counter.get_total_flops() > 0


def test_recomputation_is_counted_and_nothing_is_left_in_the_learner() -> None:
    model, again = learner("e2e", 1), learner("e2e", 1, efficiency=Efficiency(recompute="checkpoint"))
    plain, more = (step_flops(own, batch_size=4, image_size=IMAGE_SIZE) for own in (model, again))
    assert 1.2 * plain < more < 1.4 * plain
    assert all(parameter.grad is None for parameter in model.parameters())

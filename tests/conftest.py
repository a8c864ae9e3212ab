"""What holds for every test: one thread, so that sums are taken in one order, a fixed seed, signals that are heard."""

from __future__ import annotations

import pytest
import torch

from localfeat.run.signals import heed_signals

torch.set_num_threads(1)
heed_signals()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)

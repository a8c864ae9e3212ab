"""What holds for every test: one thread, so that sums are taken in one order, a fixed seed, signals that are heard."""

from __future__ import annotations

import pytest
import torch

from localfeat.run.signals import heed_signals

torch.set_num_threads(1)
heed_signals()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked gpu where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)

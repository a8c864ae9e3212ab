"""What holds for every test: one thread, so that sums are taken in one order, a fixed seed, signals that are heard."""

from __future__ import annotations

import signal

import pytest
import torch

from localfeat.run.signals import SIGNALS

torch.set_num_threads(1)

for number in SIGNALS:  # whoever has started the tests may ignore some, which child processes would inherit
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)

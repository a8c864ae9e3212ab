"""Reproduce random numbers in a resumed run: a seed for every batch, and the generators' states."""

from __future__ import annotations

import random
from typing import Any, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback


def batch_seed(seed: int, epoch: int, batch_idx: int, rank: int) -> int:
    """Return a 63-bit seed that is unrelated to those of similar arguments (NumPy's ``SeedSequence``)."""
    high, low = np.random.SeedSequence((seed, epoch, batch_idx, rank)).generate_state(2, np.uint32).tolist()
    return ((high << 32) | low) >> 1


class SeedEachBatch(Callback):
    """Seeds torch's generators (all devices) before every training batch from (seed, epoch, batch, rank).

    A batch's augmentation, dropout and drop path then do not depend on earlier events, such as validation loops or a
    kill and resume. Lightning saves no generator states, so a resumed run could not reproduce them otherwise.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(batch_seed(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))


class RandomStates(Callback):
    """Saves the states of Python's, NumPy's and torch's generators (all devices) in checkpoints.

    A resumed run then draws the same numbers, also in a user's callbacks.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        kind, words, *rest = cast("tuple[Any, ...]", np.random.get_state(legacy=True))
        return {
            "python": random.getstate(),
            "numpy": [kind, torch.from_numpy(words.astype(np.int64)), *rest],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Restore the states here and not earlier, because building the run draws numbers, too."""
        state, self._restored = self._restored, None
        if state is None:
            return
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        kind, words, *rest = state["numpy"]
        np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if len(state["cuda"]) == torch.cuda.device_count():  # other hardware draws other numbers anyway
            torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])

"""A tiny learner with the real one's interface: manual optimization, one optimizer per module, no Hydra."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.core.optimizer import do_nothing_closure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH_SIZE = 8
MIB = 2**20
NOISE = 64 * 1024  # bytes: features, losses and gradients of a tiny learner


class TinyLearner(lightning.LightningModule):
    """Two detached linear modules with dropout; ``on_step(batch_idx)`` lets a test look inside a training step."""

    def __init__(self, on_step: Callable[[int], None] = lambda batch_idx: None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.local_modules = nn.ModuleList([nn.Linear(12, 16), nn.Linear(16, 3)])
        self.on_step = on_step
        self.seen: list[float] = []  # the random number that each training batch drew

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        optimizers: Any = self.optimizers()
        optimizers[0]._on_before_step = optimizers[0]._on_after_step = do_nothing_closure
        self.seen.append(float(torch.rand(())))
        features = images.flatten(1)
        for number, (module, optimizer) in enumerate(zip(self.local_modules, optimizers, strict=True), 1):
            features = module(features.detach())
            loss = nn.functional.cross_entropy(features, labels) if number == 2 else features.square().mean()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.log(f"train/module_{number}/loss", loss.detach())
        self.log("train/loss", loss.detach())
        self.on_step(batch_idx)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        torch.rand(7)  # disturbs the global generator
        logits = self.local_modules[1](self.local_modules[0](batch[0].flatten(1)))
        self.log("val/loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("val/accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(module.parameters(), foreach=False) for module in self.local_modules]


def loader(batches: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batches * BATCH_SIZE, 3, 2, 2, generator=generator)
    labels = torch.randint(3, (batches * BATCH_SIZE,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=BATCH_SIZE)


def trainer(folder: Path, **arguments: Any) -> lightning.Trainer:
    """Return a silent trainer on the CPU that writes nothing unless a test asks for it."""
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    return lightning.Trainer(**{**defaults, **arguments})


def fit(
    folder: Path, learner: Any, callbacks: list[Any], train: int = 4, val: int = 0, **arguments: Any
) -> lightning.Trainer:
    """Fit one epoch of ``train`` batches by default; return the trainer."""
    run = trainer(folder, callbacks=callbacks, **{"max_epochs": 1, **arguments})
    run.fit(learner, loader(train), loader(val) if val else None)
    return run


def stop_at(batch: int) -> Callable[[int], None]:
    """Return an ``on_step`` that raises an error in this batch."""

    def stop(batch_idx: int) -> None:
        if batch_idx == batch:
            raise KeyError("stop")

    return stop

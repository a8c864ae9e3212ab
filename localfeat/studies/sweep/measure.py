"""Measure how fast this machine trains a network end to end, with a few steps on noise."""

from __future__ import annotations

import time

import torch
from torch import nn

from localfeat.run.build import build_datamodule, build_model
from localfeat.run.configuration import RunConfiguration
from localfeat.utils.sizes import sides

CPU_BATCH = 4
STEPS = 3
"""Timed steps, after one untimed step; the fastest counts, since other work can only slow a step down."""


def device_of(configuration: RunConfiguration) -> str:
    """Return the device that a configuration would train on here."""
    return "cuda" if torch.cuda.is_available() and configuration.trainer.accelerator != "cpu" else "cpu"


def images_per_second(configuration: RunConfiguration) -> float:
    """Return the speed of plain end-to-end training of the configuration's backbone here, from random weights."""
    device = device_of(configuration)
    batch = configuration.batch_size if device == "cuda" else CPU_BATCH
    classes = build_datamodule(configuration).num_classes
    model = build_model(configuration.without_initial_weights(), classes).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.rand(batch, configuration.in_chans, *sides(configuration.image_size), device=device)
    labels = torch.arange(batch, device=device) % classes
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(configuration.trainer.precision)
    times = [_step(model, optimizer, images, labels, mixed) for _ in range(1 + STEPS)]
    return batch / min(times[1:])


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    mixed: torch.dtype | None,
) -> float:
    """Return the seconds of one step on images (B, C, H, W) and labels (B,)."""
    _wait(images.device)
    begun = time.perf_counter()
    with torch.autocast(images.device.type, dtype=mixed, enabled=mixed is not None):
        logits = model(images)
    nn.functional.cross_entropy(logits.float(), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    _wait(images.device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

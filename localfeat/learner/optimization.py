"""The optimizer of one local module: parameter groups, learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from localfeat.utils.errors import UserError


@dataclass(frozen=True)
class Optimization:
    """AdamW for every local module, all with the same settings (Swin's recipe by default).

    Args:
        lr: peak learning rate.
        weight_decay: not applied to norms, biases, position tables and tokens.
        betas: AdamW's decay rates of both moments.
        eps: AdamW's epsilon.
        warmup: share of all batches, from 0 to 1, in which the learning rate rises linearly.
        final_lr: learning rate at the end of the cosine, as a fraction of ``lr``.
        gradient_clip: largest gradient norm of one module, ``None`` for no clipping.
        accumulate: batches per optimizer step (fewer in the last step of an epoch or run, if they do not divide).
            Gradients are averaged; contrastive losses still compare the images of one batch only, and every
            module's gradients stay allocated between batches.
        stop_after_nonfinite: steps in a row that one module skips for a non-finite loss or gradient before the run ends
            (on a GPU at the next batch whose figures are logged); ``None`` for never.
    """

    lr: float = 5e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: float = 0.05
    final_lr: float = 0.01
    gradient_clip: float | None = 5.0
    accumulate: int = 1
    stop_after_nonfinite: int | None = 10

    def __post_init__(self) -> None:
        checks = {
            "lr": (self.lr > 0, "above 0"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "betas": (len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)"),
            "eps": (self.eps > 0, "above 0"),
            "warmup": (0 <= self.warmup <= 1, "a share of the run in [0, 1]"),
            "final_lr": (0 <= self.final_lr <= 1, "a fraction of lr in [0, 1]"),
            "gradient_clip": (self.gradient_clip is None or self.gradient_clip > 0, "above 0, or null"),
            "accumulate": (self.accumulate >= 1, "at least 1"),
            "stop_after_nonfinite": (
                self.stop_after_nonfinite is None or self.stop_after_nonfinite >= 1,
                "at least 1, or null for never",
            ),
        }
        for key, (right, wanted) in checks.items():
            if not right:
                raise UserError(f"optimizer.{key}={getattr(self, key)}: it must be {wanted}")

    def build(self, module: nn.Module, never_decayed: Collection[int], *, fused: bool) -> torch.optim.Optimizer:
        """Return AdamW over ``module``'s parameters; ``never_decayed`` holds ids of parameters without weight decay.

        The ``fused`` kernel is faster and allocates nothing, but under a GradScaler it unscales inside its own
        step, after gradients should have been clipped. Without it parameters are updated one by one: torch's default
        on CUDA, ``foreach``, makes temporaries as large as all of the module's parameters together.
        """
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for parameter in module.parameters():
            if parameter.requires_grad:
                (plain if parameter.ndim <= 1 or id(parameter) in never_decayed else decayed).append(parameter)
        if not decayed and not plain:
            raise UserError("a local module has no parameter that can be trained: every one is frozen")
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        trained = [group for group in groups if group["params"]]
        return torch.optim.AdamW(trained, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused, foreach=False)

    def window(self, batch: int, per_epoch: float, left: float) -> int:
        """Return how many batches share a batch's optimizer step.

        Args:
            batch: the batch's number within the epoch, from 0.
            per_epoch: batches per epoch; infinite if the loader has no length.
            left: batches until the run ends, this one included.
        """
        position = batch % self.accumulate
        return int(min(self.accumulate, per_epoch - (batch - position), left + position))

    def lr_factor(self, batch: int, total: int) -> float:
        """Return the share of ``lr`` at a batch (from 0) of ``total``: linear warm-up, cosine to ``final_lr``."""
        warmup = round(self.warmup * total)
        if batch < warmup:
            return (batch + 1) / (warmup + 1)
        progress = min((batch - warmup) / max(total - warmup, 1), 1.0)
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def undecayed_parameters(backbone: nn.Module, local_modules: nn.Module) -> set[int]:
    """Return ids of the parameters that timm excludes from weight decay (position tables, tokens), copies included."""
    names = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else set()  # type: ignore[operator]
    found = {id(p) for name, p in backbone.named_parameters() if name in names}
    tables = {name.rpartition(".")[2] for name in names} - {"weight", "bias"}
    return found | {id(p) for name, p in local_modules.named_parameters() if name.rpartition(".")[2] in tables}

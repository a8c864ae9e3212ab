"""Optimizers and schedules of local modules under Lightning: one of each per module, one batch counted at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from localfeat.learner.checked_batches import CheckedBatches
from localfeat.learner.nonfinite import NonFinite
from localfeat.learner.optimization import Optimization, undecayed_parameters
from localfeat.methods.local_module import LocalModule
from localfeat.utils.errors import UserError


class ModulewiseSteps(CheckedBatches):
    """Steps the optimizers of local modules by hand, in every precision.

    Attributes:
        local_modules: each gets an optimizer and a schedule.
        optimization: their settings.
        nonfinite: decides whether a step is taken.
        current_module: number of the module in training, from 0.
    """

    local_modules: nn.ModuleList
    optimization: Optimization
    nonfinite: NonFinite
    current_module: int
    _gradients: dict[str, Tensor]  # of a checkpoint, until training starts

    def configure_callbacks(self) -> list[Callback]:
        """Add none. Lightning calls this first, before it refuses the same settings without saying what to give.

        Raises:
            UserError: settings of the Trainer that are this learner's own, or several devices.
        """
        trainer = self.trainer
        if trainer.state.fn == "fit" and isinstance(trainer.strategy, ParallelStrategy):
            name = type(trainer.strategy).__name__
            raise UserError(f"{name}: localfeat trains on one device for now, Trainer(devices=1) without a strategy")
        clip, batches = trainer.gradient_clip_val, trainer.accumulate_grad_batches
        given = "give the Learner optimization=localfeat.Optimization"
        if clip:
            raise UserError(f"Trainer(gradient_clip_val={clip}): {given}(gradient_clip={clip})")
        if batches > 1:
            raise UserError(f"Trainer(accumulate_grad_batches={batches}): {given}(accumulate={batches})")
        return []

    def configure_optimizers(self) -> Sequence[OptimizerLRSchedulerConfig]:
        """Return one AdamW and one schedule per local module."""
        never_decayed = undecayed_parameters(self.backbone, self.local_modules)
        configured: list[OptimizerLRSchedulerConfig] = []
        for number, module in enumerate(self.local_modules, start=1):
            optimizer = self.optimization.build(module, never_decayed, fused=self._scaler is None)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
            configured.append(
                {
                    "optimizer": optimizer,
                    "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": f"lr/module_{number}"},
                }
            )
        return configured

    def on_fit_start(self) -> None:
        """Make the GradScaler, which counts the steps of K optimizers, count batches.

        Ignore two warnings that are wrong for this loop: the schedule counts batches, also those that only accumulate,
        and checkpoints hold the states after the step.
        """
        for message in ("Detected call of `lr_scheduler.step", ".*pre-optimization state"):
            warnings.filterwarnings("ignore", message=message)
        scaler = self._scaler
        if scaler is not None:
            if self.optimization.accumulate > 1:  # the scale may change between two backwards of one step
                raise UserError("16-mixed and optimizer.accumulate above 1 exclude each other: use bf16-mixed")
            scaler.set_growth_interval(2000 * len(self.local_modules))

    def on_train_start(self) -> None:
        """Set everything that depends on the run's length and the device, which are known only now."""
        if not math.isfinite(self._total_batches()):
            raise UserError(
                "the learning-rate schedule needs an end: give the Trainer max_steps, or max_epochs and loaders that "
                "have a length"
            )
        for scheduler in self._schedulers():
            for group, base in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
                group["lr"] = base * self._lr_factor(scheduler.last_epoch)
        self.nonfinite.start(self.device, self._scaler)
        self._restore_gradients()

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run backward outside autocast, as automatic optimization does it (Lightning leaves it on in manual mode)."""
        with torch.autocast(self.device.type, enabled=False):
            super().manual_backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Check and clip one module's gradients: Lightning calls this after unscaling, in every precision."""
        norm = self.nonfinite.before_step(self.current_module, optimizer)
        if self.optimization.gradient_clip is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, self.optimization.gradient_clip, norm)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _schedulers(self) -> list[torch.optim.lr_scheduler.LambdaLR]:
        schedulers = self.lr_schedulers() or []
        return cast(
            "list[torch.optim.lr_scheduler.LambdaLR]", schedulers if isinstance(schedulers, list) else [schedulers]
        )

    def _step(self, module: int) -> None:
        """Step the optimizer of a module (from 0) and free its gradients.

        By the trainer's strategy: Lightning's own wrapper of an optimizer would count every step (see ``count_batch``).
        """
        optimizer = self.trainer.optimizers[module]
        self.nonfinite.poison(module, optimizer)
        with torch.autocast(self.device.type, enabled=False):
            self.trainer.strategy.optimizer_step(optimizer, _nothing)
        optimizer.zero_grad(set_to_none=True)
        cast(LocalModule, self.local_modules[module]).objective.after_step()

    def _restore_gradients(self) -> None:
        """Restore the gradients of a checkpoint within an accumulation window."""
        parameters = dict(self.named_parameters())
        for name, gradient in self._gradients.items():
            if name not in parameters or parameters[name].shape != gradient.shape:
                raise UserError(f"the checkpoint has a gradient of {name}, which is not one of this run's parameters")
            parameters[name].grad = gradient.to(parameters[name].device)
        self._gradients = {}

    def _window(self, batch_index: int) -> int:
        """Return how many batches share this batch's optimizer step."""
        left = self.trainer.max_steps - self.trainer.global_step if self.trainer.max_steps > 0 else math.inf
        return self.optimization.window(batch_index, float(self.trainer.num_training_batches), left)

    def _total_batches(self) -> float:
        """Return the number of batches of the whole run; infinite if it is not known (yet)."""
        epochs, steps = self.trainer.max_epochs or -1, self.trainer.max_steps
        by_epochs = epochs * float(self.trainer.num_training_batches) if epochs > 0 else math.inf
        return min(by_epochs, steps if steps > 0 else math.inf)

    def _lr_factor(self, batch: int) -> float:
        total = self._total_batches()
        return self.optimization.lr_factor(batch, int(total)) if math.isfinite(total) else 0.0


def _nothing() -> None:
    """Forward and backward have run already."""

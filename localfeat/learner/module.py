"""The training loop of every method: module by module, each with its own loss, backward and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from localfeat.backbones.decompose import Decomposition
from localfeat.backbones.modes import evaluating
from localfeat.backbones.split import ResolvableSplit, Split
from localfeat.efficiency.settings import Efficiency
from localfeat.learner.assembly import build_local_modules
from localfeat.learner.figures import TrainingFigures
from localfeat.learner.inputs import check_images, check_kind, number_of_classes
from localfeat.learner.lightning_internals import count_batch
from localfeat.learner.nonfinite import AnomalyFound, NonFinite, anomaly
from localfeat.learner.optimization import Optimization
from localfeat.learner.stepping import ModulewiseSteps
from localfeat.methods.base import Method
from localfeat.methods.local_module import LocalModule, LocalOutput
from localfeat.methods.objective import ClassifierObjective, Reconstruction
from localfeat.methods.parts.decoders import DecoderFactory, as_decoder
from localfeat.methods.registry import as_method
from localfeat.parallel.sequential import train_in_turn
from localfeat.utils.errors import UserError


class Learner(ModulewiseSteps):
    """Trains a timm model as a list of local modules under a plain ``lightning.Trainer``.

    Batches are ``(images, labels)``: normalised float images (B, C, H, W) and class indices (B,). A datamodule
    with a method ``prepare(images, labels, training=bool)`` may send anything that this method turns into
    such a batch (on the device, inside the step, so that the float images can be freed before it ends).

    Args:
        backbone: a timm model; its classifier sets the number of classes. It is trained in place and stays a plain
            timm model. For any other network, what :func:`decompose` makes of it.
        method: a name from ``METHODS`` or a :class:`Method`.
        split: K, a list of cuts, a :class:`Split` or a :class:`BalancedSplit`; ``e2e`` always trains
            one module.
        decoder: ``interp``, ``one_layer``, ``deconv`` or a factory ``(in_channels, out_channels, upscale) -> module``.
        optimization: settings of every module's optimizer.
        image_size: side of the images in pixels, or height and width, for backbones that accept any size
            (convolutional networks); ``None`` takes that of the pretrained weights.
        mean, std: the images' normalisation, per channel, for pixels in [0, 1]; ``None``
            takes what the backbone's pretrained weights expect. Only ``image_recon`` needs them, for its target.
        efficiency: settings that change time and memory only.

    Raises:
        UserError: combinations that cannot be built.
    """

    def __init__(
        self,
        backbone: nn.Module | Decomposition,
        method: str | Method = "feature_recon",
        split: Split | ResolvableSplit | int | Sequence[int] = 4,
        decoder: str | DecoderFactory = "one_layer",
        *,
        optimization: Optimization | None = None,
        image_size: int | Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        efficiency: Efficiency | None = None,
    ) -> None:
        super().__init__()
        check_kind("optimization", optimization, Optimization)
        check_kind("efficiency", efficiency, Efficiency)
        self.automatic_optimization = False
        self.method = as_method(method)
        self.optimization = optimization or Optimization()
        self.efficiency = efficiency or Efficiency()
        self._backbone = (backbone.model if isinstance(backbone, Decomposition) else backbone,)
        self.num_classes = number_of_classes(backbone)
        decode = as_decoder(decoder)
        if isinstance(split, ResolvableSplit):
            split = split.resolve(backbone, self.method, decode, image_size=image_size, efficiency=self.efficiency)
        self.local_modules = build_local_modules(
            backbone,
            self.method,
            split,
            decode,
            image_size=image_size,
            mean=mean,
            std=std,
            efficiency=self.efficiency,
        )
        self.val_accuracy = MulticlassAccuracy(self.num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(self.num_classes, average="micro")
        self.forget_training()
        if self.efficiency.compile:
            for module in self.local_modules:
                module.compile()

    @property
    def blocks_per_module(self) -> list[int]:
        """Number of backbone blocks in each local module."""
        return [len(module.blocks) for module in self._modules_in_order]

    @property
    def _modules_in_order(self) -> list[LocalModule]:
        return [cast(LocalModule, module) for module in self.local_modules]

    def forget_training(self) -> None:
        """Reset all training figures; the weights stay."""
        self.figures = TrainingFigures()
        self.nonfinite = NonFinite(self._modules_in_order)
        self.current_module, self._gradients = 0, {}

    @property
    def figures_of_training(self) -> list[Any]:
        """Objects that :meth:`forget_training` replaces."""
        return [self.figures, self.nonfinite, self._gradients]

    @property
    def epoch_means(self) -> dict[str, float]:
        """Training figures of the last finished epoch, by name."""
        return self.figures.epoch_means

    @property
    def skipped_steps(self) -> dict[str, int]:
        """Steps that every module skipped because its loss or gradient was not finite."""
        return {f"module_{number}": count for number, count in enumerate(self.nonfinite.skipped, start=1)}

    @property
    def scaler_skips(self) -> int | None:
        """Steps of all modules that the GradScaler skipped; ``None`` without a GradScaler."""
        return self.nonfinite.scaler_skips

    def forward(self, images: Tensor) -> Tensor:
        """Return the plain timm model's logits (B, num_classes) of normalised images (B, C, H, W)."""
        x = images
        for module in self._modules_in_order:
            _, x = module.body(x)
        return cast(Tensor, cast(ClassifierObjective, self._modules_in_order[-1].objective).tail(x))

    # --- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_index: int) -> None:
        """Train every module in turn on one batch. At most one module's graph is alive at a time."""
        self.backbone.training = self.training  # after validation Lightning restores registered modules only
        window = self._window(batch_index)
        steps = batch_index % self.optimization.accumulate + 1 == window or self.trainer.is_last_batch
        with self._naming_anomalies(batch_index):
            self.train_modules(
                lambda: self._prepare(batch, training=True),
                lambda loss: self.manual_backward(loss / window),
                lambda module: self._step(module) if steps else self.nonfinite.wait(module),
            )
        if steps:
            self.nonfinite.count()
        count_batch(self.trainer)  # also batches that only accumulate
        self._log_training()
        for scheduler in self._schedulers():
            scheduler.step()

    def train_modules(
        self,
        batch: Callable[[], tuple[Tensor, Tensor]],
        backward: Callable[[Tensor], None],
        update: Callable[[int], None],
    ) -> None:
        """Run one batch through the schedule (see :func:`train_in_turn`), and watch for non-finite values."""
        train_in_turn(self._modules_in_order, batch, backward, update, self)

    def begin_module(self, index: int) -> None:
        """Set the current module (from 0), and keep the statistics that a skipped step restores."""
        self.current_module = index
        self.nonfinite.begin(index)

    def see_output(self, index: int, output: LocalOutput, labels: Tensor) -> None:
        """Record a module's figures for labels (B,) or (B, num_classes), and check its loss."""
        self.nonfinite.see_loss(index, output.loss)
        self.figures.add(index, output, labels)

    def on_train_epoch_start(self) -> None:
        """Reset the epoch's means."""
        self.figures.begin_epoch()

    def on_train_epoch_end(self) -> None:
        """Keep the epoch's means for the summary."""
        self.figures.end_epoch()

    def train(self, mode: bool = True) -> Learner:
        """Also set the mode of the backbone, which is not registered."""
        super().train(mode)
        self.backbone.train(mode)
        return self

    # --- evaluation ---------------------------------------------------------------------------------------------

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Log loss and accuracy of the plain timm model."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Log loss and accuracy of the plain timm model."""
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Any, batch_index: int) -> Tensor:
        """Return the plain timm model's logits (B, num_classes) of ``images`` or ``(images, labels)``."""
        images = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if self._prepares is not None:
            images, _ = self._prepares(images, torch.zeros(len(images), dtype=torch.int64), training=False)
        check_images(images, self.backbone)
        return self(images)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> list[Reconstruction]:
        """Return each decoder's reconstruction of normalised images (B, C, H, W); empty without decoders or cuts."""
        found = []
        x = images
        with evaluating(self.backbone), evaluating(self):
            for index, module in enumerate(self._modules_in_order, start=1):
                inputs, x = module.body(x)
                found.append(module.objective.reconstruct(inputs, x, images, index))
        return [reconstruction for reconstruction in found if reconstruction is not None]

    def parameter_counts(self) -> dict[str, int]:
        """Return the numbers of parameters: backbone, auxiliary parts, both, and each local module."""
        modules = {f"module_{i}": _count(module) for i, module in enumerate(self.local_modules, start=1)}
        backbone, total = _count(self.backbone), sum(modules.values())
        return {"backbone": backbone, "auxiliary": total - backbone, "total": total, **modules}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save method and cuts, since optimizers are saved by position, and the counters."""
        checkpoint["localfeat"] = {"method": self.method.name, "blocks_per_module": self.blocks_per_module}
        checkpoint["means"] = self.figures.state_dict()
        checkpoint["nonfinite"] = self.nonfinite.state_dict()
        gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        if gradients:  # accumulated so far
            checkpoint["gradients"] = gradients

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore counters and gradients; refuse a checkpoint of another method or other cuts."""
        own = {"method": self.method.name, "blocks_per_module": self.blocks_per_module}
        saved = checkpoint.get("localfeat")
        if saved != own:
            raise UserError(f"the checkpoint was written by {saved}, and this run is {own}")
        self.figures.load_state_dict(checkpoint["means"])
        if "nonfinite" in checkpoint:  # since version 0.1
            self.nonfinite.load_state_dict(checkpoint["nonfinite"])
        self._gradients = checkpoint.get("gradients", {})

    # --- inner parts --------------------------------------------------------------------------------------------

    def _prepare(self, batch: Any, training: bool) -> tuple[Tensor, Tensor]:
        if self._prepares is not None:
            return self._prepares(*batch, training=training)
        images, labels = batch
        return images, labels

    @contextmanager
    def _naming_anomalies(self, batch_index: int) -> Iterator[None]:
        """Turn an error of anomaly detection into one line.

        Raises:
            AnomalyFound: anomaly detection found NaN; names the module and the operation.
        """
        try:
            yield
        except RuntimeError as error:
            operation = anomaly(error)
            if operation is None:
                raise
            place = f"epoch {self.trainer.current_epoch}, batch {batch_index}"
            raise AnomalyFound(self.current_module + 1, operation, place) from error

    @property
    def logs_batch(self) -> bool:
        """Whether the figures of the current batch are logged."""
        return bool(self.trainer.global_step % cast(Any, self.trainer).log_every_n_steps == 0)

    def _log_training(self) -> None:
        self.figures.count()
        if self.logs_batch:
            lr = self._schedulers()[0].optimizer.param_groups[0]["lr"]  # get_last_lr() is 0 at the first batch
            skipped = self.nonfinite.total.float()
            self.log_dict({**self.figures.latest, "train/lr": lr, "train/skipped_steps": skipped}, batch_size=1)
            self.log("loss", self.figures.latest["train/loss"], prog_bar=True, logger=False, batch_size=1)

    def _evaluate(self, batch: Any, stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = self._prepare(batch, training=False)
        logits = self(images).float()
        accuracy.update(logits, labels)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log(f"{stage}/loss", loss, on_epoch=True, on_step=False, batch_size=len(labels))
        self.log(f"{stage}/accuracy", accuracy, on_epoch=True, on_step=False, prog_bar=True, batch_size=len(labels))


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())

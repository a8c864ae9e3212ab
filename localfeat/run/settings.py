"""Settings without a class elsewhere in localfeat: the top level and backbone, dataset, trainer, callbacks.

Nothing heavy is imported here: these settings are checked before torch is.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from localfeat.run.construct import check_values, typed
from localfeat.utils.channels import check_channels
from localfeat.utils.errors import UserError
from localfeat.utils.files import not_a
from localfeat.utils.sizes import sides
from localfeat.utils.text import shown

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class BackboneSettings:
    """The timm model to train and the source of its initial weights.

    Args:
        name: the timm model's name.
        label: the name in results; ``None`` for the model's.
        variants: image size -> the timm model used instead of ``name`` at that size.
        pretrained: whether to load timm's ImageNet weights.
        weights: a file of weights for this model; its classifier is ignored.
        drop_path_rate: the stochastic depth rate; ``None`` keeps the model's own.
        arguments: further constructor arguments of the model.

    Raises:
        UserError: both ``pretrained`` and ``weights`` are given, or variants of another network.
    """

    name: str
    label: str | None = None
    variants: Mapping[int, str] | None = None
    pretrained: bool = False
    weights: str | None = None
    drop_path_rate: float | None = None
    arguments: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.weights and self.pretrained:
            raise UserError("backbone.pretrained and backbone.weights: initial weights come from one of them")
        if "in_chans" in (self.arguments or {}):
            raise UserError("backbone.arguments.in_chans: set in_chans, for the images and the backbone")
        for size, other in (self.variants or {}).items():
            if _network(other) != _network(self.name):
                raise UserError(
                    f"backbone.name={self.name}: its group has {other} for {size} px, of another network; "
                    f"type backbone=timm backbone.name={self.name}"
                )

    def model_name(self, image_size: int | tuple[int, int]) -> str:
        """Return the name of the timm model for images of ``image_size`` pixels."""
        from localfeat.backbones.timm_models import model_name

        return model_name(self.name, image_size, self.variants)


def _network(name: str) -> list[str]:
    """Return a model's network and size, ``["swin", "base"]`` of ``swin_base_patch4_window7_224``."""
    return name.split("_")[:2]


@dataclass(frozen=True)
class Part:
    """A configured class or function with its checked arguments, called once the other arguments are known.

    Attributes:
        target: the class or function.
        values: its arguments from the configuration.
    """

    target: Callable[..., Any]
    values: Mapping[str, Any] = field(default_factory=dict)

    def build(self, **more: Any) -> Any:
        """Call the target; ``more`` holds arguments that no configuration can hold."""
        return self.target(**self.values, **more)


@dataclass(frozen=True)
class DatasetSettings(Part):
    """The datamodule and its arguments."""

    @property
    def source(self) -> str:
        """Name of the dataset."""
        return str(self.values["source"])

    @property
    def root(self) -> str:
        """The folder of the dataset's files."""
        return str(self.values.get("root", "data"))

    @property
    def val_fraction(self) -> float:
        """The share of the training images held out for validation."""
        return float(self.values.get("val_fraction", 0.1))

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix turns labels into probabilities."""
        return bool(self.values.get("mixup") or self.values.get("cutmix"))


@dataclass(frozen=True)
class TrainerSettings:
    """The configurable arguments of Lightning's Trainer; see its documentation.

    Raises:
        UserError: more than one device, numbers out of range, fp16 with anomaly detection.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    precision: Precision = "32-true"
    deterministic: bool = False
    log_every_n_steps: int = 10
    max_steps: int = -1
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    limit_test_batches: int | float | None = None
    num_sanity_val_steps: int = 0
    detect_anomaly: bool = False
    profiler: Literal["simple", "advanced", "pytorch"] | None = None

    def __post_init__(self) -> None:
        if self.devices != 1:
            devices = self.devices
            raise UserError(f"trainer.devices={devices}: localfeat trains on one device for now, trainer.devices=1")
        if self.precision == "16-mixed" and self.detect_anomaly:
            raise UserError(
                "trainer.detect_anomaly=true and trainer.precision=16-mixed cannot be combined: 16-bit gradients "
                "overflow now and then, which is not an anomaly; use bf16-mixed or 32-true"
            )
        if self.log_every_n_steps < 1:
            raise UserError(f"trainer.log_every_n_steps={self.log_every_n_steps}: it must be at least 1")
        if self.max_steps < 1 and self.max_steps != -1:
            raise UserError(f"trainer.max_steps={self.max_steps}: it must be at least 1, or -1 for no limit")
        if self.num_sanity_val_steps < -1:
            steps = self.num_sanity_val_steps
            raise UserError(f"trainer.num_sanity_val_steps={steps}: it must be at least -1 (all batches)")
        for split, limit in self.limits.items():
            _check_limit(f"trainer.limit_{split}_batches", limit)

    @property
    def limits(self) -> dict[str, int | float | None]:
        """The batches per epoch of ``train``, ``val`` and ``test``: a number, a share, or ``None`` for all."""
        return {"train": self.limit_train_batches, "val": self.limit_val_batches, "test": self.limit_test_batches}


def _check_limit(key: str, limit: int | float | None) -> None:
    if limit is not None and (limit <= 0 or (isinstance(limit, float) and limit > 1)):
        raise UserError(f"{key}={limit}: it must be a number of batches from 1, a share like 0.1, or null for all")


@dataclass(frozen=True)
class CallbackSettings:
    """The settings of a run's callbacks.

    Args:
        checkpoint_every_n_epochs: the number of epochs between writes of ``checkpoints/last.ckpt``.
        checkpoint_every_n_batches: the number of batches between further writes; ``None`` for none.
        progress_bar: whether to show progress.
        early_stopping: epochs without a better validation accuracy that end the run; ``None`` for never.
        ema: the decay of the weights' moving average; ``None`` for no average.

    Raises:
        UserError: values out of range.
    """

    checkpoint_every_n_epochs: int = 1
    checkpoint_every_n_batches: int | None = None
    progress_bar: bool = True
    early_stopping: int | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        for name in ("checkpoint_every_n_epochs", "checkpoint_every_n_batches", "early_stopping"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"callbacks.{name}={value}: it must be at least 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"callbacks.ema={self.ema}: a decay lies between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class PlainSettings:
    """A run's settings that need no torch.

    Args:
        seed: the seed of weights, batches and validation split.
        image_size: the side of the network's input in pixels, or height and width.
        in_chans: the channels of the images.
        batch_size: images per step.
        epochs: the number of epochs.
        trainer, callbacks: the configuration groups of the same name.
        output_dir: the parent folder of all runs.
        test: whether the test set is scored at the end.
        resume: ``auto`` or the folder of the run to resume; ``None`` for a new run.

    Raises:
        UserError: values out of range.
    """

    seed: int
    image_size: int | tuple[int, int]
    batch_size: int
    epochs: int
    in_chans: int = 3
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    callbacks: CallbackSettings = field(default_factory=CallbackSettings)
    output_dir: str = "outputs"
    test: bool = True
    resume: str | None = None

    def __post_init__(self) -> None:
        sides(self.image_size)
        check_channels(self.in_chans)
        for key in ("batch_size", "epochs"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}: it must lie between 0 and {2**32 - 1}")


def check_plain_settings(values: Mapping[str, Any]) -> None:
    """Check the plain settings among the values of a configuration.

    Raises:
        UserError: a value of the wrong type or out of range, a wrong combination.
    """
    hints = typing.get_type_hints(PlainSettings)
    groups = {"trainer": TrainerSettings, "callbacks": CallbackSettings}
    plain = {name: values[name] for name in hints if name in values and name not in groups}
    checked = check_values(plain, hints, ("seed", "image_size", "batch_size", "epochs"), "")
    PlainSettings(**checked, **{name: typed(kind, values.get(name, {}), name) for name, kind in groups.items()})


def check_paths(values: Mapping[str, Any]) -> None:
    """Check that the image folder and the file of initial weights that a new run needs exist.

    Raises:
        UserError: one of them is missing.
    """
    dataset, backbone = _group(values, "dataset"), _group(values, "backbone")
    root, weights = dataset.get("root"), backbone.get("weights")
    if dataset.get("source") == "image_folder" and not os.path.isdir(folder := os.path.expanduser(str(root))):
        raise UserError(f"dataset.root={shown(str(root))}: {not_a('folder', folder)}")
    if isinstance(weights, str) and not os.path.isfile(file := os.path.expanduser(weights)):
        raise UserError(f"backbone.weights={shown(weights)}: {not_a('file', file)}")


def _group(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}

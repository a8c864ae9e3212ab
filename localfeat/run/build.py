"""Build a run's objects from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from torch import nn

from localfeat.backbones.timm_models import build_backbone
from localfeat.data.datamodule import ImageDataModule
from localfeat.learner.module import Learner
from localfeat.run.callbacks.logging_interval import LogShortRuns
from localfeat.run.callbacks.nonfinite import StopOnNonFinite
from localfeat.run.callbacks.peak_memory import PeakMemory
from localfeat.run.callbacks.seeding import RandomStates, SeedEachBatch
from localfeat.run.callbacks.stop_on_signal import StopOnSignal
from localfeat.run.callbacks.throughput import Throughput
from localfeat.run.checkpoints.callbacks import AveragedWeights, BestCheckpoint, LastCheckpoint
from localfeat.run.configuration import OF_RUN, RunConfiguration
from localfeat.run.console import RunProgress
from localfeat.run.folder import RunFolder
from localfeat.run.loggers.metrics_csv import MetricsCsv
from localfeat.run.output import tell
from localfeat.run.settings import CallbackSettings, TrainerSettings
from localfeat.run.signals import StopRequest
from localfeat.run.trust import check_fits
from localfeat.run.weights import load_backbone_weights
from localfeat.utils.errors import UserError
from localfeat.utils.text import shown


def build_datamodule(configuration: RunConfiguration) -> ImageDataModule:
    """Return the datamodule, which normalises images as the backbone expects."""
    dataset, (mean, std) = configuration.dataset, configuration.normalisation
    try:
        datamodule = replace(dataset, values={**dataset.values, "mean": mean, "std": std}).build()
    except UserError as error:
        key = str(error).partition("=")[0]
        typed_there = key in dataset.values and key not in OF_RUN
        raise UserError(f"dataset.{error}" if typed_there else str(error)) from error
    check_fits(datamodule, configuration.values.get("dataset", {}).get("_target_", dataset.target), "dataset")
    assert isinstance(datamodule, ImageDataModule)
    return datamodule


def build_model(configuration: RunConfiguration, num_classes: int) -> nn.Module:
    """Return the backbone with the initial weights that the configuration names; tell how a file of them was read."""
    settings = {name: value for name, value in vars(configuration.backbone).items() if name not in ("weights", "label")}
    size, channels = configuration.image_size, configuration.in_chans
    model = build_backbone(num_classes=num_classes, image_size=size, in_chans=channels, **settings)
    if configuration.backbone.weights:
        notes = load_backbone_weights(model, configuration.backbone.weights, reset_classifier=True)
        tell(f"initial weights: {shown(configuration.backbone.weights)}{', '.join(['', *notes])}")
    return model


def build_learner(configuration: RunConfiguration, num_classes: int) -> Learner:
    """Return the learner over a new backbone."""
    mean, std = configuration.normalisation
    return Learner(
        build_model(configuration, num_classes),
        configuration.method,
        configuration.split,
        configuration.decoder,
        optimization=configuration.optimizer,
        image_size=configuration.image_size,
        mean=mean,
        std=std,
        efficiency=configuration.efficiency,
    )


def build_callbacks(
    settings: CallbackSettings, seed: int, folder: RunFolder, validates: bool, stop: StopRequest | None = None
) -> list[Callback]:
    """Return a run's callbacks; those that write checkpoints come last.

    Args:
        settings: the callbacks' settings.
        seed: the run's seed, from which every batch's seed follows.
        folder: the run's folder.
        validates: whether the run has a validation split to choose the best epoch by.
        stop: the request that signals set; None if signals are not handled.

    Raises:
        UserError: early stopping without validation.
    """
    patience = settings.early_stopping
    if patience is not None and not validates:
        raise UserError(f"callbacks.early_stopping={patience}: it needs validation, dataset.val_fraction above 0")
    stop = stop or StopRequest()
    found: list[Callback] = [
        StopOnSignal(stop),
        RandomStates(),
        SeedEachBatch(seed),
        LogShortRuns(),
        Throughput(),
        PeakMemory(),
    ]
    if settings.progress_bar:
        found.append(RunProgress())
    if settings.ema is not None:
        found.append(AveragedWeights(decay=settings.ema))
    if patience is not None:
        found.append(EarlyStopping("val/accuracy", patience=patience, mode="max"))
    found.append(StopOnNonFinite())
    if validates:
        found.append(BestCheckpoint(folder.best))
    epochs, batches = settings.checkpoint_every_n_epochs, settings.checkpoint_every_n_batches
    found.append(LastCheckpoint(folder.last, epochs=epochs, batches=batches, stop=stop))
    return found  # LastCheckpoint is last because it saves the state of the others


def build_loggers(configuration: RunConfiguration, folder: RunFolder, names: Mapping[str, Any]) -> list[Logger]:
    """Return the logger of ``metrics.csv`` and the configured one; ``names`` fill the arguments that are null."""
    found: list[Logger] = [MetricsCsv(folder.path)]
    chosen = configuration.logger
    if chosen is not None:
        open_names = {key: names.get(key) for key, value in chosen.values.items() if value is None}
        found.append(chosen.target(**{**chosen.values, **open_names}, save_dir=folder.path))
    return found


def build_trainer(settings: TrainerSettings, **parts: Any) -> lightning.Trainer:
    """Return a trainer for one device; ``parts`` holds its epochs, folder, loggers and callbacks.

    Raises:
        UserError: a GPU is asked for and not available, or fp16 without a GPU.
    """
    cuda = torch.cuda.is_available() and settings.accelerator != "cpu"
    if settings.accelerator == "gpu" and not cuda:
        raise UserError("trainer=gpu: torch finds no usable GPU; trainer=cpu works everywhere")
    if settings.precision == "16-mixed" and not cuda:
        raise UserError("trainer.precision=16-mixed needs a GPU: use bf16-mixed")
    arguments = {**asdict(settings), "accelerator": "gpu" if cuda else "cpu"}
    if settings.profiler is not None:  # its table belongs in the run's folder
        arguments["profiler"] = _PROFILERS[settings.profiler](dirpath=parts["default_root_dir"], filename="profile")
    return lightning.Trainer(**arguments, enable_model_summary=False, **parts)


_PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}

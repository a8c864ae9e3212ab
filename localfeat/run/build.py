"""From a run's configuration to its objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning
import timm
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from torch import nn

from localfeat.backbones.timm_models import build_backbone
from localfeat.data import ImageDataModule
from localfeat.learner.module import Learner
from localfeat.run.callbacks.logging_interval import LogShortRuns
from localfeat.run.callbacks.nonfinite import StopOnNonFinite
from localfeat.run.callbacks.peak_memory import PeakMemory
from localfeat.run.callbacks.seeding import RandomStates, SeedEachBatch
from localfeat.run.callbacks.stop_on_signal import StopOnSignal
from localfeat.run.callbacks.throughput import Throughput
from localfeat.run.checkpoints.callbacks import AveragedWeights, BestCheckpoint, LastCheckpoint
from localfeat.run.configuration import RunConfiguration
from localfeat.run.console import RunProgress
from localfeat.run.export import load_backbone_weights
from localfeat.run.folder import RunFolder
from localfeat.run.loggers.metrics_csv import MetricsCsv
from localfeat.run.settings import CallbackSettings, TrainerSettings
from localfeat.run.signals import StopRequest
from localfeat.run.trust import check_fits
from localfeat.utils.errors import UserError


def build_datamodule(configuration: RunConfiguration) -> ImageDataModule:
    """Return the datamodule, normalising as the backbone expects it."""
    known = timm.get_pretrained_cfg(configuration.model_name)
    expected = {"mean": known.mean, "std": known.std} if known else {}
    dataset = configuration.dataset
    datamodule = dataset.build(**expected)
    check_fits(datamodule, configuration.values.get("dataset", {}).get("_target_", dataset.target), "dataset")
    assert isinstance(datamodule, ImageDataModule)
    return datamodule


def build_model(configuration: RunConfiguration, num_classes: int) -> nn.Module:
    """Return the backbone, with its initial weights from wherever the configuration says."""
    settings = {name: value for name, value in vars(configuration.backbone).items() if name != "weights"}
    model = build_backbone(num_classes=num_classes, image_size=configuration.image_size, **settings)
    if configuration.backbone.weights:
        load_backbone_weights(model, configuration.backbone.weights, reset_classifier=True)
    return model


def build_learner(configuration: RunConfiguration, num_classes: int) -> Learner:
    """Return the learner over a new backbone."""
    return Learner(
        build_model(configuration, num_classes),
        configuration.method,
        configuration.split,
        configuration.decoder,
        optimization=configuration.optimizer,
        image_size=configuration.image_size,
        efficiency=configuration.efficiency,
    )


def build_callbacks(
    settings: CallbackSettings, seed: int, folder: RunFolder, validates: bool, stop: StopRequest | None = None
) -> list[Callback]:
    """Return everything that watches a run, checkpoints last.

    Args:
        settings: which callbacks.
        seed: of every batch's random numbers.
        folder: of the run.
        validates: whether there is a validation split to choose the best epoch by.
        stop: what signals have asked for; None: nobody handles signals.

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
    return found  # the last of all: it saves what the others know


def build_loggers(configuration: RunConfiguration, folder: RunFolder, names: Mapping[str, Any]) -> list[Logger]:
    """Return ``metrics.csv`` always, and the logger chosen; ``names`` fill what the user left open."""
    found: list[Logger] = [MetricsCsv(folder.path)]
    chosen = configuration.logger
    if chosen is not None:
        open_names = {key: names.get(key) for key, value in chosen.values.items() if value is None}
        found.append(chosen.target(**{**chosen.values, **open_names}, save_dir=folder.path))
    return found


def build_trainer(settings: TrainerSettings, **parts: Any) -> lightning.Trainer:
    """Return a trainer for one device; ``parts`` are the epochs, folder, loggers and callbacks.

    Raises:
        UserError: a GPU that is not there, fp16 without a GPU.
    """
    cuda = torch.cuda.is_available() and settings.accelerator != "cpu"
    if settings.accelerator == "gpu" and not cuda:
        raise UserError("trainer=gpu: there is no GPU that this torch can use; trainer=cpu works everywhere")
    if settings.precision == "16-mixed" and not cuda:
        raise UserError("trainer.precision=16-mixed needs a GPU: use bf16-mixed")
    arguments = {**asdict(settings), "accelerator": "gpu" if cuda else "cpu"}
    if settings.profiler is not None:  # its table goes into the run's folder
        arguments["profiler"] = _PROFILERS[settings.profiler](dirpath=parts["default_root_dir"], filename="profile")
    return lightning.Trainer(**arguments, enable_model_summary=False, **parts)


_PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}

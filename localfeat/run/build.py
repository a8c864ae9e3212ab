"""From a resolved configuration (plain dicts) to the objects of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning
import timm
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import Logger
from torch import nn

from localfeat.backbones.timm_models import build_backbone, model_name
from localfeat.data import ImageDataModule
from localfeat.learner.module import Learner
from localfeat.methods.base import Method
from localfeat.run.callbacks.logging_interval import LogShortRuns
from localfeat.run.callbacks.nonfinite import StopOnNonFinite
from localfeat.run.callbacks.peak_memory import PeakMemory
from localfeat.run.callbacks.seeding import RandomStates, SeedEachBatch
from localfeat.run.callbacks.stop_on_signal import StopOnSignal
from localfeat.run.callbacks.throughput import Throughput
from localfeat.run.checkpoints.callbacks import AveragedWeights, BestCheckpoint, LastCheckpoint
from localfeat.run.configuration import check_types, construct, target_and_values
from localfeat.run.console import RunProgress
from localfeat.run.export import load_backbone_weights
from localfeat.run.folder import CHECKPOINTS
from localfeat.run.loggers.metrics_csv import MetricsCsv
from localfeat.run.signals import StopRequest
from localfeat.utils.errors import UserError

Config = dict[str, Any]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def build_datamodule(config: Config) -> ImageDataModule:
    """The datamodule, normalising as the backbone expects it."""
    backbone = config["backbone"]
    known = timm.get_pretrained_cfg(model_name(backbone["name"], config["image_size"], backbone["variants"]))
    expected = {"mean": known.mean, "std": known.std} if known else {}
    datamodule = construct(config["dataset"], "dataset", **expected)
    assert isinstance(datamodule, ImageDataModule)
    return datamodule


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The backbone, with its initial weights from wherever the configuration says."""
    values, weights = _backbone_values(config["backbone"])
    model = build_backbone(num_classes=num_classes, image_size=config["image_size"], **values)
    if weights:
        load_backbone_weights(model, weights, reset_classifier=True)
    return model


def without_initial_weights(config: Config) -> Config:
    """The same configuration with a backbone whose weights come from nowhere: they follow, or are not needed."""
    return {**config, "backbone": {**config["backbone"], "pretrained": False, "weights": None}}


def _backbone_values(group: Config) -> tuple[Config, str | None]:
    """Checked arguments of the backbone, and the file that its initial weights come from."""
    values = dict(group)
    weights: str | None = check_types(_weights, {"weights": values.pop("weights", None)}, "backbone")["weights"]
    values = check_types(build_backbone, values, "backbone", ("num_classes", "image_size"))
    if weights and values.get("pretrained"):
        raise UserError("backbone.pretrained and backbone.weights: initial weights come from one of them")
    return values, weights


def _weights(weights: str | None) -> None:
    """The type of ``backbone.weights``, which is no argument of the backbone."""


def build_learner(config: Config, num_classes: int) -> Learner:
    """The learner over a new backbone."""
    method = construct(config["method"], "method")
    split = construct(config["split"], "split")
    decoder = construct(config["decoder"], "decoder")
    optimization = construct(config["optimizer"], "optimizer")
    return Learner(
        build_model(config, num_classes),
        method,
        split,
        decoder,
        optimization=optimization,
        image_size=config["image_size"],
        efficiency=construct(config["efficiency"], "efficiency"),
    )


def check(config: Config) -> Config:
    """The same configuration with every value of its declared type; refuses what cannot be.

    What depends on the data or the backbone is refused when those are built.

    Raises:
        UserError: unknown keys, values of the wrong type or out of range, combinations that exclude each other.
    """
    checked = check_types(_top_level, config, "")
    for key in ("image_size", "batch_size", "epochs"):
        if checked[key] < 1:
            raise UserError(f"{key}={checked[key]}: it must be at least 1")
    if not 0 <= checked["seed"] < 2**32:
        raise UserError(f"seed={checked['seed']}: it must lie between 0 and {2**32 - 1}")
    checked["trainer"] = check_types(build_trainer, config["trainer"], "trainer")
    checked["callbacks"] = check_types(
        build_callbacks, config["callbacks"], "callbacks", ("seed", "folder", "validates", "stop")
    )
    _backbone_values(config["backbone"])
    for part in ("split", "decoder", "optimizer", "efficiency"):
        construct(config[part], part)
    _check_dataset(checked, construct(config["method"], "method"))
    return checked


def _top_level(
    seed: int,
    image_size: int,
    batch_size: int,
    epochs: int,
    output_dir: str,
    backbone: Config,
    optimizer: Config,
    dataset: Config,
    split: Config,
    decoder: Config,
    method: Config,
    efficiency: Config,
    trainer: Config,
    logger: Config,
    callbacks: Config,
    resume: str | None = None,
    test: bool = True,
) -> None:
    """The types of the top-level values."""


def _check_dataset(config: Config, method: Method) -> None:
    """Values of the data set that have to go together with others."""
    _, dataset = target_and_values(config["dataset"], "dataset", ("mean", "std"))
    for key in ("image_size", "batch_size", "seed"):
        if dataset.get(key, config[key]) != config[key]:
            raise UserError(f"dataset.{key}={dataset[key]} is not {key}={config[key]}, which it follows: set {key}")
    if not method.contrasts:
        return
    if dataset.get("mixup") or dataset.get("cutmix"):
        raise UserError(
            f"method={method.name} contrasts images by their class, which mixup and cutmix blur: "
            "set dataset.mixup=0 dataset.cutmix=0, or method.supervision=cross_entropy"
        )
    if config["batch_size"] < 2:
        raise UserError(f"batch_size={config['batch_size']}: method={method.name} contrasts images, at least 2 of them")


def build_callbacks(
    seed: int,
    folder: Path,
    validates: bool,
    stop: StopRequest | None = None,
    checkpoint_every_n_epochs: int = 1,
    checkpoint_every_n_batches: int | None = None,
    progress_bar: bool = True,
    early_stopping: int | None = None,
    ema: float | None = None,
) -> list[Callback]:
    """Everything that watches a run, checkpoints last.

    Args:
        seed: of every batch's random numbers.
        folder: of the run.
        validates: whether there is a validation split to choose the best epoch by.
        stop: what signals have asked for; None: nobody handles signals.
        checkpoint_every_n_epochs: how often ``checkpoints/last.ckpt`` is written.
        checkpoint_every_n_batches: also within epochs.
        progress_bar: ``False`` for none.
        early_stopping: epochs without a better validation accuracy before the run ends.
        ema: decay of the weights' moving average.

    Raises:
        UserError: values out of range, early stopping without validation.
    """
    _check_callbacks(checkpoint_every_n_epochs, checkpoint_every_n_batches, early_stopping, ema)
    if early_stopping is not None and not validates:
        raise UserError(f"callbacks.early_stopping={early_stopping}: it needs validation, dataset.val_fraction above 0")
    stop = stop or StopRequest()
    found: list[Callback] = [
        StopOnSignal(stop),
        RandomStates(),
        SeedEachBatch(seed),
        LogShortRuns(),
        Throughput(),
        PeakMemory(),
    ]
    if progress_bar:
        found.append(RunProgress())
    if ema is not None:
        found.append(AveragedWeights(decay=ema))
    if early_stopping is not None:
        found.append(EarlyStopping("val/accuracy", patience=early_stopping, mode="max"))
    found.append(StopOnNonFinite())
    checkpoints = folder / CHECKPOINTS
    if validates:
        found.append(BestCheckpoint(checkpoints))
    found.append(
        LastCheckpoint(checkpoints, epochs=checkpoint_every_n_epochs, batches=checkpoint_every_n_batches, stop=stop)
    )  # the last of all: it saves what the others know
    return found


def _check_callbacks(epochs: int, batches: int | None, early_stopping: int | None, ema: float | None) -> None:
    for name, value in (
        ("checkpoint_every_n_epochs", epochs),
        ("checkpoint_every_n_batches", batches),
        ("early_stopping", early_stopping),
    ):
        if value is not None and value < 1:
            raise UserError(f"callbacks.{name}={value}: it must be at least 1")
    if ema is not None and not 0 < ema < 1:
        raise UserError(f"callbacks.ema={ema}: a decay lies between 0 and 1")


def build_loggers(config: Config, folder: Path, names: Mapping[str, Any]) -> list[Logger]:
    """``metrics.csv`` always, and the logger chosen; ``names`` fill what the user left open."""
    found: list[Logger] = [MetricsCsv(folder)]
    chosen = config["logger"]
    if chosen:
        filled = {key: names.get(key) if value is None else value for key, value in chosen.items()}
        found.append(construct(filled, "logger", save_dir=folder))
    return found


def build_trainer(
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    devices: int = 1,
    precision: Precision = "32-true",
    deterministic: bool = False,
    log_every_n_steps: int = 10,
    max_steps: int = -1,
    limit_train_batches: int | float | None = None,
    limit_val_batches: int | float | None = None,
    limit_test_batches: int | float | None = None,
    num_sanity_val_steps: int = 0,
    detect_anomaly: bool = False,
    **parts: Any,
) -> lightning.Trainer:
    """A trainer for one device; ``parts`` are the epochs, folder, loggers and callbacks.

    Raises:
        UserError: more than one device, a GPU that is not there, fp16 without a GPU or with anomaly detection, numbers
            out of range.
    """
    if devices != 1:
        raise UserError(f"trainer.devices={devices}: localfeat trains on one device for now, trainer.devices=1")
    cuda = torch.cuda.is_available() and accelerator != "cpu"
    if accelerator == "gpu" and not cuda:
        raise UserError("trainer=gpu: there is no GPU that this torch can use; trainer=cpu works everywhere")
    if precision == "16-mixed" and not cuda:
        raise UserError("trainer.precision=16-mixed needs a GPU: use bf16-mixed")
    if precision == "16-mixed" and detect_anomaly:
        raise UserError(
            "trainer.detect_anomaly=true and trainer.precision=16-mixed exclude each other: 16-bit gradients overflow "
            "now and then, which is no anomaly; use bf16-mixed or 32-true"
        )
    if log_every_n_steps < 1:
        raise UserError(f"trainer.log_every_n_steps={log_every_n_steps}: it must be at least 1")
    if max_steps < 1 and max_steps != -1:
        raise UserError(f"trainer.max_steps={max_steps}: it must be at least 1, or -1 for no limit")
    if num_sanity_val_steps < -1:
        raise UserError(f"trainer.num_sanity_val_steps={num_sanity_val_steps}: it must be at least -1 (all batches)")
    for split, limit in (("train", limit_train_batches), ("val", limit_val_batches), ("test", limit_test_batches)):
        _check_limit(f"trainer.limit_{split}_batches", limit)
    return lightning.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=1,
        precision=precision,
        deterministic=deterministic,
        log_every_n_steps=log_every_n_steps,
        max_steps=max_steps,
        limit_train_batches=limit_train_batches,
        limit_val_batches=limit_val_batches,
        limit_test_batches=limit_test_batches,
        num_sanity_val_steps=num_sanity_val_steps,
        detect_anomaly=detect_anomaly,
        enable_model_summary=False,
        **parts,
    )


def _check_limit(key: str, limit: int | float | None) -> None:
    if limit is not None and (limit <= 0 or (isinstance(limit, float) and limit > 1)):
        raise UserError(f"{key}={limit}: it must be a number of batches from 1 on, a share like 0.1, or null for all")

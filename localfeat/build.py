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

from localfeat.artifacts.callbacks import LogShortRuns, SeedEachBatch, Throughput
from localfeat.artifacts.checkpoints import AveragedWeights, BestCheckpoint, LastCheckpoint
from localfeat.artifacts.console import RunProgress
from localfeat.artifacts.export import load_backbone_weights
from localfeat.artifacts.metrics_csv import MetricsCsv
from localfeat.artifacts.peak_memory import PeakMemory
from localfeat.config import check_types, construct
from localfeat.data import ImageDataModule
from localfeat.errors import UserError
from localfeat.learner import Learner
from localfeat.network import build_backbone, model_name

Config = dict[str, Any]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def build_datamodule(config: Config) -> ImageDataModule:
    """The datamodule, normalising as the backbone expects it."""
    backbone = config["backbone"]
    known = timm.get_pretrained_cfg(model_name(backbone["name"], config["image_size"], backbone["variants"]))
    mean, std = (known.mean, known.std) if known else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    datamodule = construct(config["dataset"], "dataset", mean=mean, std=std)
    assert isinstance(datamodule, ImageDataModule)
    return datamodule


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The backbone, with its initial weights from wherever the configuration says."""
    values = dict(config["backbone"])
    weights = values.pop("weights")
    if weights and values["pretrained"]:
        raise UserError("backbone.pretrained and backbone.weights: initial weights come from one of them")
    checked = check_types(build_backbone, values, "backbone")
    model = build_backbone(num_classes=num_classes, image_size=config["image_size"], **checked)
    if weights:
        load_backbone_weights(model, weights, reset_classifier=True)
    return model


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
        compile=config["efficiency"]["compile"],
    )


def check(config: Config) -> None:
    """Refuse what cannot be, before anything is built.

    Raises:
        UserError: values of the wrong type or out of range, combinations that exclude each other.
    """
    check_types(_top_level, {key: config[key] for key in ("seed", "image_size", "batch_size", "epochs")}, "")
    for key in ("image_size", "batch_size", "epochs"):
        if config[key] < 1:
            raise UserError(f"{key}={config[key]}: it must be at least 1")
    if config["seed"] < 0:
        raise UserError(f"seed={config['seed']}: it must be at least 0")
    check_types(build_trainer, config["trainer"], "trainer")
    check_types(build_callbacks, config["callbacks"], "callbacks")
    check_types(_efficiency, config["efficiency"], "efficiency")
    dataset, method = config["dataset"], construct(config["method"], "method")
    if method.contrasts and (dataset["mixup"] or dataset["cutmix"]):
        raise UserError(
            f"method={method.name} contrasts images by their class, which mixup and cutmix blur: "
            "set dataset.mixup=0 dataset.cutmix=0, or method.supervision=cross_entropy"
        )


def _top_level(seed: int, image_size: int, batch_size: int, epochs: int) -> None:
    """The types of the top-level values."""


def _efficiency(compile: bool) -> None:
    """The types of the group ``efficiency``."""


def build_callbacks(
    seed: int,
    folder: Path,
    validates: bool,
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
        checkpoint_every_n_epochs: how often ``checkpoints/last.ckpt`` is written.
        checkpoint_every_n_batches: also within epochs.
        progress_bar: ``False`` for none.
        early_stopping: epochs without a better validation accuracy before the run ends.
        ema: decay of the weights' moving average.
    """
    if checkpoint_every_n_epochs < 1 or (checkpoint_every_n_batches or 1) < 1:
        raise UserError("callbacks.checkpoint_every_n_epochs and checkpoint_every_n_batches are at least 1")
    if ema is not None and not 0 < ema < 1:
        raise UserError(f"callbacks.ema={ema}: a decay lies between 0 and 1")
    if early_stopping is not None and (early_stopping < 1 or not validates):
        raise UserError(f"callbacks.early_stopping={early_stopping}: it needs 1 epoch or more, and a validation split")
    found: list[Callback] = [SeedEachBatch(seed), LogShortRuns(), Throughput(), PeakMemory()]
    if progress_bar:
        found.append(RunProgress())
    if ema is not None:
        found.append(AveragedWeights(decay=ema))
    if early_stopping is not None:
        found.append(EarlyStopping("val/accuracy", patience=early_stopping, mode="max"))
    checkpoints = folder / "checkpoints"
    if validates:
        found.append(BestCheckpoint(checkpoints))
    found.append(
        LastCheckpoint(checkpoints, epochs=checkpoint_every_n_epochs, batches=checkpoint_every_n_batches)
    )  # the last of all: it saves what the others know
    return found


def build_loggers(config: Config, folder: Path, resume_from: int | None, names: Mapping[str, Any]) -> list[Logger]:
    """``metrics.csv`` always, and the logger chosen; ``names`` fill what the user left open."""
    found: list[Logger] = [MetricsCsv(folder, resume_from_step=resume_from)]
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
    **parts: Any,
) -> lightning.Trainer:
    """A trainer for one device; ``parts`` are the epochs, folder, loggers and callbacks.

    Raises:
        UserError: more than one device, a GPU that is not there, fp16 without a GPU.
    """
    if devices != 1:
        raise UserError(f"trainer.devices={devices}: localfeat trains on one device for now, trainer.devices=1")
    cuda = torch.cuda.is_available() and accelerator != "cpu"
    if accelerator == "gpu" and not cuda:
        raise UserError("trainer=gpu: there is no GPU that this torch can use; trainer=cpu works everywhere")
    if precision == "16-mixed" and not cuda:
        raise UserError("trainer.precision=16-mixed needs a GPU: use bf16-mixed")
    if log_every_n_steps < 1:
        raise UserError(f"trainer.log_every_n_steps={log_every_n_steps}: it must be at least 1")
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
        enable_model_summary=False,
        **parts,
    )

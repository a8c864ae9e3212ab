"""Train one run from beginning to end: build, fit, test, and write its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from localfeat.backbones.split import Split
from localfeat.data.datamodule import ImageDataModule
from localfeat.learner.module import Learner
from localfeat.run import wandb_results
from localfeat.run.build import build_callbacks, build_datamodule, build_learner, build_loggers, build_trainer
from localfeat.run.callbacks.peak_memory import PeakMemory
from localfeat.run.callbacks.stop_on_signal import StopOnSignal
from localfeat.run.callbacks.throughput import Throughput
from localfeat.run.checkpoints.callbacks import BestCheckpoint
from localfeat.run.checkpoints.files import WholeCheckpointIO, read_checkpoint, remove_previous
from localfeat.run.configuration import RunConfiguration
from localfeat.run.console import final_table
from localfeat.run.export import built_for_a_size, export_backbone
from localfeat.run.figures import learning_curves, reconstruction_grid
from localfeat.run.folder import RunFolder
from localfeat.run.output import built, tell
from localfeat.run.process import clean_process, quiet
from localfeat.run.resume import check_folder, take_over
from localfeat.run.signals import StopRequest
from localfeat.run.summary import RunSummary, environment, write_summary
from localfeat.utils.errors import RunFailed, Stopped, UserError
from localfeat.utils.files import failing_in_one_line, write_whole
from localfeat.utils.locks import check_free, sole_run

_C = TypeVar("_C", bound=Callback)


def train(
    configuration: RunConfiguration, folder: RunFolder, *, resume: bool, notes: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Train a configuration in ``folder``; return the content of summary.json.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP stop it; while it trains, the current batch is finished and saved first.

    Args:
        configuration: the run's configuration.
        folder: the run's folder.
        resume: whether to resume the run in ``folder``, from its newest sound checkpoint or, without one, from the
            beginning.
        notes: files that a new run writes once it has locked its folder, name -> text.

    Raises:
        UserError: the configuration is invalid, or ``folder`` holds a run already; nothing was trained or overwritten.
        RunFailed: the environment failed the run, for example with a full disk.
        Stopped: a signal stopped the run.
    """
    quiet()
    stop = StopRequest()
    with stop.listening(), clean_process(configuration.seed):
        return _train(configuration, folder, stop, {} if resume else notes, resume=resume)


def _train(
    configuration: RunConfiguration, folder: RunFolder, stop: StopRequest, notes: Mapping[str, str], *, resume: bool
) -> dict[str, Any]:
    surroundings = environment()  # read now: a commit made during training is not the code that ran
    check_free(folder.path)
    check_folder(folder, resume=resume)
    datamodule = build_datamodule(configuration)
    trainer = _trainer(configuration, folder, datamodule, stop)
    has_weights = resume and folder.resumable()  # then no pretrained weights need downloading
    initial = configuration.without_initial_weights() if has_weights else configuration
    learner = build_learner(initial, datamodule.num_classes)
    datamodule.prepare_data()  # last, so that a refusal need not wait for a download
    datamodule.setup("fit")
    _check_shares(configuration, datamodule)
    tell(_built(learner, datamodule, trainer))
    with ExitStack() as stack:
        with failing_in_one_line(folder.path):
            stack.enter_context(sole_run(folder.path))
            checkpoint = take_over(folder, trainer, resume=resume)
        found = _with_cuts(configuration, learner)
        wandb_results.begin(trainer.loggers, found, learner, folder, resume=resume)
        for name, text in {
            **notes,
            folder.config.name: OmegaConf.to_yaml(OmegaConf.create(dict(found.values))),
        }.items():
            with failing_in_one_line(folder.path / name):
                write_whole(folder.path / name, text.encode())
        _fit(trainer, learner, datamodule, checkpoint, stop)
        best = _load_best(learner, folder, trainer)
        summary = _summarise(configuration, folder, trainer, learner, best, surroundings)
        if configuration.test:
            summary.test_accuracy = trainer.test(learner, datamodule=datamodule, verbose=False)[0]["test/accuracy"]
        summary.classes = datamodule.class_names
        return _write(configuration, folder, summary, trainer, learner, datamodule)


def _built(learner: Learner, datamodule: ImageDataModule, trainer: lightning.Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return built(learner.parameter_counts()["total"], learner.blocks_per_module, datamodule.training_images, name)


def _fit(
    trainer: lightning.Trainer,
    learner: Learner,
    datamodule: ImageDataModule,
    checkpoint: Path | None,
    stop: StopRequest,
) -> None:
    """Train until the end, or until a signal.

    Raises:
        UserError: among others, the checkpoint belongs to another run.
    """
    try:
        trainer.fit(learner, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    except (UserError, RunFailed, OSError):
        raise
    except Exception as error:
        if checkpoint is None or _callback(trainer, StopOnSignal).began:
            raise
        line = str(error).strip().splitlines() or [""]
        raise UserError(f"{checkpoint} does not fit this run ({type(error).__name__}: {line[0]})") from error
    if (signum := stop()) is not None:  # received after the last batch
        raise Stopped(signum)


def _with_cuts(configuration: RunConfiguration, learner: Learner) -> RunConfiguration:
    """Return the configuration with the cuts that a search has found, so that they are not searched for again."""
    if isinstance(configuration.split, Split):
        return configuration
    return configuration.with_cuts(list(accumulate(learner.blocks_per_module))[:-1])


def _check_shares(configuration: RunConfiguration, datamodule: ImageDataModule) -> None:
    """Refuse a share that is less than one batch; Lightning would refuse it for the test set only after training."""
    loaders = {
        "train": datamodule.train_dataloader,
        "val": datamodule.val_dataloader,
        "test": datamodule.test_dataloader,
    }
    for split, loader in loaders.items():
        share = configuration.trainer.limits[split]
        if isinstance(share, float) and share < 1 and int(share * len(loader())) < 1 <= len(loader()):
            raise UserError(f"trainer.limit_{split}_batches={share}: less than one of {len(loader())} batches")


def _trainer(
    configuration: RunConfiguration, folder: RunFolder, datamodule: ImageDataModule, stop: StopRequest
) -> lightning.Trainer:
    validates = datamodule.source.has_validation() or datamodule.val_fraction > 0
    loggers = build_loggers(configuration, folder, _names(configuration, folder))
    callbacks = build_callbacks(configuration.callbacks, configuration.seed, folder, validates, stop)
    return build_trainer(
        configuration.trainer,
        max_epochs=configuration.epochs,
        default_root_dir=folder.path,
        callbacks=[*wandb_results.callbacks(loggers), *callbacks],
        logger=loggers,
        plugins=[WholeCheckpointIO()],
        enable_progress_bar=configuration.callbacks.progress_bar,
    )


def _names(configuration: RunConfiguration, folder: RunFolder) -> dict[str, str | None]:
    """Return the default name and group of a W&B run; the jobs of a sweep share a group."""
    split = configuration.split
    modules = split.modules if isinstance(split, Split) else split.k
    cut = f"k{modules}" if modules else "cuts"
    path, in_sweep = folder.path, folder.path.name.isdigit()
    return {
        "name": f"{configuration.dataset.source}-{configuration.method.name}-{cut}-seed{configuration.seed}",
        "group": f"{path.parent.parent.name}_{path.parent.name}" if in_sweep else None,
    }


def _load_best(learner: Learner, folder: RunFolder, trainer: lightning.Trainer) -> BestCheckpoint | None:
    """Load the weights that were best on validation, else the last ones; return the callback that kept the best."""
    known = [c for c in trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint) and c.score is not None]
    best = known[0] if known else None
    file = folder.last if best is None else folder.best
    if not file.is_file():
        raise UserError(f"{file} does not exist: nothing was trained")
    learner.load_state_dict(read_checkpoint(file)["state_dict"])
    return best


def _callback(trainer: lightning.Trainer, kind: type[_C]) -> _C:
    return next(c for c in trainer.callbacks if isinstance(c, kind))  # type: ignore[attr-defined]


def _summarise(
    configuration: RunConfiguration,
    folder: RunFolder,
    trainer: lightning.Trainer,
    learner: Learner,
    best: BestCheckpoint | None,
    surroundings: dict[str, Any],
) -> RunSummary:
    speed, memory = _callback(trainer, Throughput), _callback(trainer, PeakMemory)
    losses = {name: value for name, value in learner.epoch_means.items() if name.startswith("train/module_")}
    return RunSummary(
        method=learner.method.name,
        dataset=configuration.dataset.source,
        backbone=configuration.backbone_label,
        split=learner.blocks_per_module,
        decoder=configuration.decoder_name if learner.method.decodes else None,
        seed=configuration.seed,
        epochs=trainer.current_epoch,
        batch_size=configuration.batch_size,
        precision=configuration.trainer.precision,
        val_accuracy=None if best is None else best.score,
        best_epoch=None if best is None else best.epoch,
        images_per_second=speed.images_per_second,
        peak_memory_bytes=memory.peak_bytes,
        peak_memory_source=memory.source,
        peak_reserved_bytes=memory.reserved_bytes,
        module_peak_memory_bytes=memory.module_peak_bytes,
        seconds=speed.seconds,
        parameters=learner.parameter_counts(),
        module_losses={name.removeprefix("train/"): value for name, value in losses.items()},
        skipped_steps=learner.skipped_steps,
        scaler_skips=learner.scaler_skips,
        overrides=folder.read_overrides(),
        **surroundings,
    )


def _scored(trainer: lightning.Trainer, datamodule: ImageDataModule) -> str:
    """Return ``"on 32 of 359 images"`` if only a part of the test set was scored, else nothing."""
    if trainer.test_dataloaders is None:
        return ""
    images = len(cast(Sized, trainer.test_dataloaders.loader.dataset))
    scored = min(sum(trainer.num_test_batches) * datamodule.eval_batch_size, images)
    return "" if scored == images else f"on {scored:,} of {images:,} images"


def _write(
    configuration: RunConfiguration,
    folder: RunFolder,
    summary: RunSummary,
    trainer: lightning.Trainer,
    learner: Learner,
    datamodule: ImageDataModule,
) -> dict[str, Any]:
    """Write the run's files, print the final table, and send both to W&B; return the summary."""
    learner.eval()
    with failing_in_one_line(folder.weights):
        size = configuration.image_size if built_for_a_size(learner.backbone) else None
        mean, std = configuration.normalisation
        arguments = configuration.backbone.arguments
        export_backbone(learner.backbone, folder.weights, img_size=size, arguments=arguments, mean=mean, std=std)
    images = {"learning_curves": folder.path / "learning_curves.png"}
    title = str(_names(configuration, folder)["name"])
    learning_curves(folder.metrics, images["learning_curves"], title=title)
    reconstructions, pixels = wandb_results.reconstructed(learner, datamodule)
    if reconstructions:
        images["reconstructions"] = folder.path / "reconstructions.png"
        reconstruction_grid(reconstructions, pixels, images["reconstructions"], title=title)
    with failing_in_one_line(folder.summary):
        write_summary(folder.summary, summary)
    remove_previous(folder)
    wandb_results.end(trainer.loggers, summary, images, reconstructions)
    final_table(summary, folder.path, scored=_scored(trainer, datamodule))
    return summary.to_dict()

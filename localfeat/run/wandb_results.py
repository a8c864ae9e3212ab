"""Send Weights & Biases a run's configuration, tables, pictures and summary; metrics go through the logger."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from localfeat.data.datamodule import ImageDataModule
from localfeat.learner.module import Learner
from localfeat.run.callbacks.peak_memory import GIB
from localfeat.run.configuration import RunConfiguration
from localfeat.run.figures import Reconstructed, as_pixels
from localfeat.run.folder import RunFolder
from localfeat.run.loggers.wandb_logger import RunLogger, log_images
from localfeat.run.summary import RunSummary, environment

SHOWN = 8  # images per picture
SMALLEST = 64  # smallest side of an image in a picture, in pixels: feature maps are enlarged

Table = tuple[list[str], list[list[Any]]]
"""Columns and rows."""


def begin(
    loggers: Iterable[Logger], configuration: RunConfiguration, learner: Learner, folder: RunFolder, *, resume: bool
) -> None:
    """Start W&B's run, and give every logger the configuration.

    Raises:
        UserError: see :meth:`RunLogger.begin`.
    """
    for logger in loggers:
        if not isinstance(logger, RunLogger):
            logger.log_hyperparams(dict(configuration.values))
            continue
        network = network_of(configuration, learner)
        tags = [learner.method.name, configuration.dataset.source, network["model"], f"k{network['modules']}"]
        logger.begin(folder.path, resume=resume, tags=tags)
        more = {"network": network, "environment": environment(), "folder": str(folder)}
        logger.log_hyperparams({**configuration.values, **more})


def network_of(configuration: RunConfiguration, learner: Learner) -> dict[str, Any]:
    """Return facts that follow from the configuration, to sort runs by: model, modules, blocks, parameters."""
    return {
        "model": configuration.backbone_label,
        "modules": len(learner.blocks_per_module),
        "blocks_per_module": learner.blocks_per_module,
        "parameters": learner.parameter_counts(),
    }


def end(
    loggers: Iterable[Logger],
    summary: RunSummary,
    images: Mapping[str, Path],
    reconstructions: Sequence[Reconstructed],
) -> None:
    """Send the results of a finished run: summary.json, two tables, the pictures."""
    for logger in loggers:
        if isinstance(logger, RunLogger):
            logger.attempt(partial(_tell, logger, summary, images, reconstructions))


def _tell(
    logger: RunLogger,
    summary: RunSummary,
    images: Mapping[str, Path],
    reconstructions: Sequence[Reconstructed],
    run: Any,
) -> None:
    run.summary.update(summary.to_dict())
    logger.log_table("modules", *modules_table(summary))
    logger.log_table("results", *results_table(summary))
    log_images(logger, images)
    log_reconstructions(logger, reconstructions)


def modules_table(summary: RunSummary) -> Table:
    """Return one row per local module; losses are means over the last epoch, None if a module has no such term."""
    terms = sorted({name.partition("/")[2] for name in summary.module_losses}, key=lambda term: (term != "loss", term))
    columns = ["module", "first_block", "last_block", "parameters", "peak_memory_gib", *terms]
    ends = list(accumulate(summary.split))
    rows = []
    for number, (blocks, end) in enumerate(zip(summary.split, ends, strict=True), start=1):
        name = f"module_{number}"
        losses = [summary.module_losses.get(f"{name}/{term}") for term in terms]
        peak = summary.module_peak_memory_bytes.get(name)
        parameters = summary.parameters[name]
        rows.append([number, end - blocks + 1, end, parameters, None if peak is None else peak / GIB, *losses])
    return columns, rows


RESULTS = (
    "method",
    "dataset",
    "backbone",
    "decoder",
    "seed",
    "epochs",
    "test_accuracy",
    "val_accuracy",
    "best_epoch",
    "images_per_second",
    "seconds",
)


def results_table(summary: RunSummary) -> Table:
    """Return one row, so that the tables of many runs can be joined."""
    values = {name: getattr(summary, name) for name in RESULTS}
    values["modules"] = len(summary.split)
    peak = summary.peak_memory_bytes
    values["peak_memory_gib"] = None if peak is None else peak / GIB
    values |= {f"parameters_{part}": summary.parameters[part] for part in ("backbone", "auxiliary")}
    return list(values), [list(values.values())]


def reconstructed(learner: Learner, datamodule: ImageDataModule) -> tuple[list[Any], Tensor]:
    """Return reconstructions of some validation images (training images without validation), and these images.

    Test images are never used. The images (B, C, H, W) lie in [0, 1].
    """
    split = "train" if datamodule.val_dataloader() == [] else "val"
    images, labels = next(iter(datamodule.ordered_loader(split)))
    pixels, _ = datamodule.prepare(images[:SHOWN].to(learner.device), labels[:SHOWN], training=False)
    return learner.reconstruct(pixels), images[:SHOWN].float() / 255


def log_reconstructions(logger: RunLogger, found: Sequence[Reconstructed], step: int | None = None) -> None:
    """Log one picture for each module that reconstructs: ``reconstructions/module_<i>``."""
    import wandb

    for entry in found:
        shape = "×".join(map(str, entry.target.shape[1:]))
        what = "the image" if entry.kind == "image" else "its input features (three principal components)"
        caption = f"module {entry.module} reconstructs {what}, {shape}: target above, reconstruction below"
        name = f"reconstructions/module_{entry.module}"
        logger.log_metrics({name: wandb.Image(picture(entry), caption=caption)}, step)


def picture(entry: Reconstructed) -> Image:
    """Return a picture with targets in the first row and reconstructions below, enlarged without smoothing."""
    target, output = as_pixels(entry, SHOWN)
    factor = max(1, -(-SMALLEST // target.shape[-1]))
    both = interpolate(torch.cat([target, output]), scale_factor=factor)
    return to_pil_image(make_grid(both, nrow=len(target)))


class LogReconstructions(Callback):
    """Logs reconstructions after validation in every n-th epoch, without affecting the training."""

    def __init__(self, logger: RunLogger, every: int) -> None:
        self.logger, self.every = logger, every

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log here, before PeakMemory measures again, because this memory is not the training's."""
        if not trainer.sanity_checking and (trainer.current_epoch + 1) % self.every == 0:
            assert isinstance(pl_module, Learner)
            found, _ = reconstructed(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
            step = trainer.global_step - 1
            self.logger.attempt(lambda _: log_reconstructions(self.logger, found, step))


def callbacks(loggers: Iterable[Logger]) -> Iterator[Callback]:
    """Yield the callbacks that loggers need during training."""
    for logger in loggers:
        if isinstance(logger, RunLogger) and logger.reconstructions_every_n_epochs:
            yield LogReconstructions(logger, logger.reconstructions_every_n_epochs)

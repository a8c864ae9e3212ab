"""Inspect a run: load the networks, measure, write ``inspection.json`` and its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, cast

import torch

from localfeat.data.labelled import BatchLoader, LabelledImages
from localfeat.run.figures import reconstruction_grid
from localfeat.run.folder import RunFolder
from localfeat.run.summary import write_summary
from localfeat.studies.probe.features import Features, Network, Place, open_network, sample
from localfeat.studies.probe.figures import accuracy_by_depth, cka_heat_map
from localfeat.studies.probe.probes import NEIGHBOURS, linear_probe, neighbour_accuracy, standardised
from localfeat.studies.probe.similarity import linear_cka_matrix
from localfeat.utils.errors import UserError

Found = dict[str, Any]

PICTURES = ("accuracy_by_depth.png", "cka.png", "reconstructions.png")
DRAWN = 8
"""The number of images whose reconstructions are drawn."""


@dataclass(frozen=True)
class Request:
    """The settings of an inspection, see :data:`localfeat.studies.probe.command.USAGE`."""

    run: Path
    e2e: Path | None = None
    split: str = "val"
    images: int = 5000
    train_images: int = 10_000
    checkpoint: str = "best"
    root: str | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        if self.split not in ("val", "test"):
            raise UserError(f"split={self.split}: it is val or test (the probes are fitted on training images)")
        for key in ("images", "train_images"):
            if getattr(self, key) < 2:
                raise UserError(f"{key}={getattr(self, key)}: it must be at least 2")

    @property
    def folder(self) -> Path:
        """The folder for the results."""
        return self.output or self.run / "inspection"


def inspect_run(request: Request) -> Found:
    """Measure a run's network block by block; return the content of ``inspection.json``.

    Raises:
        UserError: no such run, checkpoint or data; runs that cannot be compared; an output that cannot be written to.
    """
    own = open_network(RunFolder(request.run), request.checkpoint, request.root)
    other = None if request.e2e is None else open_network(RunFolder(request.e2e), request.checkpoint, request.root)
    if other is not None:
        _check_comparable(own, other, request)
    _make_folder(request.folder)
    train = sample(own.datamodule, "train", request.train_images)
    held_out = sample(own.datamodule, request.split, request.images)
    found, features = measured(own, train, held_out)
    reference = None if other is None else measured(other, train, held_out)
    count = len(cast(LabelledImages, train.dataset))
    result = {
        "run": str(request.run),
        "method": own.name,
        "split": request.split,
        "images": len(features.labels),
        "train_images": count,
        "neighbours": min(NEIGHBOURS, count),
        "checkpoint": request.checkpoint,
        **found,
        "cka": _cka(features, features if reference is None else reference[1], other),
        "reference": None if other is None or reference is None else _reference(other, reference[0]),
    }
    _write(request.folder, result)
    _draw_reconstructions(own, held_out, request.folder / "reconstructions.png")
    return result


def measured(network: Network, train: BatchLoader, held_out: BatchLoader) -> tuple[Found, Features]:
    """Return the accuracies of a network's blocks, modules and classifier on ``held_out``, and its features there."""
    known, asked = network.features(train), network.features(held_out)
    classes = network.datamodule.num_classes
    blocks = []
    for place, before, after in zip(network.places, known.means, asked.means, strict=True):
        fitted_on, scored_on = standardised(before, after)
        data = (fitted_on, known.labels.numpy(), scored_on, asked.labels.numpy())
        accuracies = {"linear_probe": linear_probe(*data, classes), "knn": neighbour_accuracy(*data)}
        blocks.append({**_described(place), **accuracies})
    modules = [{key: b[key] for key in ("module", "linear_probe", "knn")} for b in blocks if b["ends_module"]]
    accuracy = float((asked.predictions == asked.labels).double().mean())
    return {"blocks": blocks, "modules": modules, "classifier_accuracy": accuracy}, asked


def _described(place: Place) -> Found:
    return {
        "block": "embedding" if place.block is None else place.block,
        "module": place.module,
        "channels": place.channels,
        "ends_module": place.ends_module,
    }


def _reference(other: Network, found: Found) -> Found:
    return {"run": str(other.folder), "method": other.name, **found}


def _cka(own: Features, other: Features, network: Network | None) -> Found:
    """Return the CKA between blocks, without the patch embeddings."""
    return {
        "with": None if network is None else str(network.folder),
        "own_blocks": list(range(len(own.means) - 1)),
        "other_blocks": list(range(len(other.means) - 1)),
        "matrix": linear_cka_matrix(own.means[1:], other.means[1:]).tolist(),
    }


def _check_comparable(own: Network, other: Network, request: Request) -> None:
    """Refuse a run of another dataset, or one that was trained on images to be evaluated."""
    mine, its = own.configuration.dataset, other.configuration.dataset
    if mine.source != its.source:
        raise UserError(f"e2e={other.folder}: its dataset is {its.source}, but run has {mine.source}")
    folders = [Path(dataset.root).resolve() for dataset in (mine, its)]
    if mine.source == "image_folder" and folders[0] != folders[1]:
        raise UserError(f"e2e={other.folder}: its images are in {its.root}, those of run in {mine.root}")
    if request.split == "test" or own.datamodule.source.has_validation():
        return
    for key, has, had in (
        ("seed", own.configuration.seed, other.configuration.seed),
        ("val_fraction", mine.val_fraction, its.val_fraction),
    ):
        if has != had:
            raise UserError(
                f"e2e={other.folder}: with dataset.{key}={had} (run: {has}) it was trained on validation "
                f"images of run: give a run with dataset.{key}={has}, or split=test"
            )


def _make_folder(folder: Path) -> None:
    """Create the folder, remove the files of an earlier inspection, and test that it can be written to.

    Raises:
        UserError: the folder cannot be written to, which should not show only after minutes of measuring.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("inspection.json", *PICTURES):
            (folder / name).unlink(missing_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output={folder}: it cannot be written to ({error.strerror})") from error


def _write(folder: Path, found: Found) -> None:
    write_summary(folder / "inspection.json", found)
    accuracy_by_depth(found, folder / "accuracy_by_depth.png")
    cka_heat_map(found, folder / "cka.png")


def _draw_reconstructions(network: Network, loader: BatchLoader, file: Path) -> None:
    """Draw reconstructions, if the run has decoders, of images from all over the sample, which is sorted by class."""
    images = cast(LabelledImages, loader.dataset)
    raw, labels = images.fetch(torch.linspace(0, len(images) - 1, DRAWN).long().unique())
    pixels, _ = network.datamodule.prepare(raw.to(network.learner.device), labels, training=False)
    if found := network.learner.reconstruct(pixels):
        reconstruction_grid(found, raw.float() / 255, file)

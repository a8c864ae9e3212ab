"""The FLOPs of training an image, by accounting: a run's own loop on the meta device."""

from __future__ import annotations

import json

import torch

from localfeat.memory.accounting import step_flops
from localfeat.run.build import build_learner
from localfeat.run.configuration import RunConfiguration
from localfeat.studies.report.runs import Run
from localfeat.utils.errors import UserError

_MATTERS = ("backbone", "method", "split", "decoder", "efficiency", "image_size", "in_chans", "batch_size", "dataset")


def training_flops(run: Run) -> float | None:
    """Return the FLOPs of an image's training step, or ``None`` if the run's network cannot be built here."""
    classes, decoder = run.summary.get("classes"), run.config["decoder"]
    other_decoder = str(decoder["_target_"]).endswith("InterpDecoder") and "widths" not in decoder  # of version 0.1
    if not classes or other_decoder:
        return None
    key = json.dumps([len(classes), *(run.config.get(name) for name in _MATTERS)], sort_keys=True)
    if key not in _KNOWN:
        _KNOWN[key] = _counted(run, len(classes))
    return _KNOWN[key]


_KNOWN: dict[str, float | None] = {}


def _counted(run: Run, classes: int) -> float | None:
    try:
        configuration = RunConfiguration.from_values(run.config)
        with torch.device("meta"):
            learner = build_learner(configuration.without_initial_weights(), classes)
        size, mixes = configuration.batch_size, configuration.dataset.mixes
        return step_flops(learner, batch_size=size, image_size=configuration.image_size, soft_labels=mixes) / size
    except UserError:
        return None

"""A finished run, read back from its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from localfeat.learner.module import Learner
from localfeat.run.build import Config, build_learner, without_initial_weights
from localfeat.run.checkpoints.files import read_checkpoint
from localfeat.run.folder import CHECKPOINTS
from localfeat.utils.errors import UserError


def open_learner(folder: Path, config: Config, num_classes: int, checkpoint: str) -> Learner:
    """The run's learner in evaluation mode, on the GPU if there is one, with the weights of a checkpoint.

    Args:
        folder: of the run.
        config: what the run was configured by (``saved_config(folder)``).
        num_classes: of its classifier.
        checkpoint: ``best`` (on validation; the last one of a run without validation) or ``last``.

    Raises:
        UserError: no such checkpoint, a damaged one, or one of another network.
    """
    file = _checkpoint_file(folder, checkpoint)
    state = read_checkpoint(file)["state_dict"]
    plain = {"_target_": "localfeat.Efficiency"}
    learner = build_learner({**without_initial_weights(config), "efficiency": plain}, num_classes)
    try:
        learner.load_state_dict(state)
    except Exception as error:
        raise UserError(f"{file} cannot be loaded into this run's network: {str(error).splitlines()[0]}") from error
    return learner.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def read_summary(folder: Path) -> dict[str, Any]:
    """What the run wrote down when it ended.

    Raises:
        UserError: the run has not ended, or the file is damaged.
    """
    file = folder / "summary.json"
    if not file.is_file():
        raise UserError(f"{folder} has no summary.json: the run has not ended (resume={folder} goes on with it)")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:  # no JSON, or no text
        raise UserError(f"{file} is damaged, or no summary of a run ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged, or no summary of a run")
    return found


def _checkpoint_file(folder: Path, checkpoint: str) -> Path:
    if checkpoint not in ("best", "last"):
        raise UserError(f"checkpoint={checkpoint}: it is best or last")
    names = ["best", "last"] if checkpoint == "best" else ["last"]
    files = [folder / CHECKPOINTS / f"{name}.ckpt" for name in names]
    for file in files:
        if file.is_file():
            return file
    raise UserError(f"there is no checkpoint {files[0]}")

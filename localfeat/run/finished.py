"""Load a finished run's network."""

from __future__ import annotations

from dataclasses import replace

import torch

from localfeat.efficiency.settings import Efficiency
from localfeat.learner.module import Learner
from localfeat.run.build import build_learner
from localfeat.run.checkpoints.files import read_checkpoint
from localfeat.run.configuration import RunConfiguration
from localfeat.run.folder import RunFolder
from localfeat.utils.errors import UserError


def saved_configuration(folder: RunFolder) -> RunConfiguration:
    """Return the configuration in a run's folder.

    Raises:
        UserError: not a run's folder, or an invalid ``config.yaml``.
    """
    values = folder.read_config()
    try:
        return RunConfiguration.from_values(values)
    except UserError as error:
        raise UserError(f"{folder.config} cannot be read: {error}") from error


def open_learner(folder: RunFolder, configuration: RunConfiguration, num_classes: int, checkpoint: str) -> Learner:
    """Return the run's learner with a checkpoint's weights, in evaluation mode, on the GPU if there is one.

    Args:
        folder: the run's folder.
        configuration: the run's configuration.
        num_classes: the number of its classifier's classes.
        checkpoint: ``best`` (on validation; the last one of a run without validation) or ``last``.

    Raises:
        UserError: no such checkpoint, a damaged one, or one of another network.
    """
    file = folder.checkpoint(checkpoint)
    try:
        state = read_checkpoint(file)["state_dict"]
    except UserError as error:
        raise UserError(f"{error}{folder.instead_of(file)}") from error
    learner = build_learner(replace(configuration.without_initial_weights(), efficiency=Efficiency()), num_classes)
    try:
        learner.load_state_dict(state)
    except Exception as error:
        raise UserError(f"{file} cannot be loaded into this run's network: {str(error).splitlines()[0]}") from error
    return learner.eval().to("cuda" if torch.cuda.is_available() else "cpu")

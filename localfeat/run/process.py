"""What a run changes in its process, and gives back: seeds, environment, warnings, W&B, the GPU's memory."""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from localfeat.run.loggers import wandb_service
from localfeat.utils.errors import Stopped


def quiet() -> None:
    """Silence messages of libraries that a user of localfeat can do nothing about."""
    for name in ("lightning.pytorch", "timm"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "You're resuming from a checkpoint that ended before the epoch ended",
        ".*does not have many workers",
        "Checkpoint directory .* exists and is not empty",
        ".*smaller than the logging interval",
        "Found .* module.* in eval mode",
        ".*isinstance.treespec, LeafSpec..*",
        "Total length of .list. across ranks is zero",  # no validation
    ):
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def clean_process(seed: int) -> Iterator[None]:
    """Seed everything, and afterwards restore the process for the next job of a sweep."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    environment, unraisable = dict(os.environ), sys.unraisablehook
    sys.unraisablehook = lambda found: None if _is_worker_death(found.exc_value) else unraisable(found)
    exit_code = 0
    try:
        yield
    except BaseException as error:
        exit_code = 128 + error.signum if isinstance(error, Stopped) else 1
        raise
    finally:
        sys.unraisablehook = unraisable
        if "wandb" in sys.modules:
            wandb_service.finish(exit_code)
        for name in os.environ.keys() - environment.keys():  # Lightning sets one for deterministic runs
            del os.environ[name]
        os.environ.update(environment)
        torch.use_deterministic_algorithms(False)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_worker_death(error: BaseException | None) -> bool:
    """Return whether torch reports a killed worker process in a finaliser, where Python can only print it.

    Torch raises wherever the main process is when the signal arrives. The loader raises again at its next batch, which
    ends the run with one line.
    """
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")

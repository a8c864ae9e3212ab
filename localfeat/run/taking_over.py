"""A run's folder before training begins in it: whose it is, and where to go on."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning

from localfeat.run.checkpoints.files import newest_sound
from localfeat.run.folder import BEST, CHECKPOINTS, has_ended, left_to_go_on
from localfeat.run.inside import check_inside
from localfeat.run.loggers.metrics_csv import MetricsCsv
from localfeat.utils.errors import UserError
from localfeat.utils.files import remove_parts


def check_folder(folder: Path, *, resume: bool) -> None:
    """Refuse to train where a run would be damaged, or where files of somebody else would be written to.

    Raises:
        UserError: says what is there.
    """
    if folder.is_dir():
        check_inside(folder)
    if has_ended(folder):
        if resume:
            raise UserError(f"resume={folder}: this run has ended, its summary.json is there")
        raise UserError(f"{folder} holds a run that has ended: give another folder, or move this one away")
    if not resume and left_to_go_on(folder):
        raise UserError(f"{folder} holds a run that was cut short: resume={folder} goes on with it, or move it away")


def take_over(folder: Path, trainer: lightning.Trainer, *, resume: bool) -> Path | None:
    """Put the folder in order, now that nobody else trains there (see ``sole_run``).

    Args:
        folder: of the run; it need not hold one.
        trainer: whose ``MetricsCsv`` is told where to go on.
        resume: go on with the run there.

    Returns:
        The checkpoint to go on from; None for the beginning.

    Raises:
        UserError: see ``check_folder``; also if all checkpoints are damaged.
    """
    check_folder(folder, resume=resume)  # another process may have been there meanwhile
    for place in (folder, folder / CHECKPOINTS):
        remove_parts(place)
    if not resume:
        (folder / CHECKPOINTS / BEST).unlink(missing_ok=True)  # of one that was killed before its first last.ckpt
        return None
    checkpoint, batches = newest_sound(folder)
    if checkpoint is None:
        print(f"{folder}: no checkpoint yet, the run begins at its beginning")
        (folder / CHECKPOINTS / BEST).unlink(missing_ok=True)
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCsv):
            logger.resume_from_step = batches
            if batches >= trainer.log_every_n_steps and not logger.path.is_file():  # type: ignore[attr-defined]
                print(f"warning: {logger.path} is gone: it begins again behind batch {batches}", file=sys.stderr)
    return checkpoint

"""Resume a run: find the one that the same command began, and take its folder over."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning

from localfeat.run.checkpoints.files import newest_sound
from localfeat.run.folder import RunFolder
from localfeat.run.loggers.metrics_csv import MetricsCsv
from localfeat.utils.errors import UserError
from localfeat.utils.files import remove_parts
from localfeat.utils.text import as_typed

NEUTRAL = ("resume", "output_dir", "dataset.root", "dataset.download", "dataset.num_workers", "dataset.in_memory")
NEUTRAL_PARTS = ("logger", "callbacks.progress_bar", "callbacks.checkpoint_every_")
"""Keys that can change no result: a run may have begun with other values of them."""

OF_OWN_IMAGES = ("dataset.root", "dataset.in_memory")
"""Neutral, but not for dataset=image_folder: which images they are, and at which size they are kept."""

DEPTHS = ("*/*", "*/*/*")
"""Where runs lie in ``output_dir``: a day's folder, the run's; for sweeps, the job's in there."""


def is_neutral(key: str) -> bool:
    """Whether a key can change no result."""
    return key in NEUTRAL or key.startswith(NEUTRAL_PARTS)


def earlier_run(asked: Mapping[str, Any], folder: RunFolder) -> RunFolder | None:
    """The newest run that ``asked`` describes, finished or not: the one in ``folder`` or one in the output folder.

    A folder of the user's own choice, elsewhere than new runs go, is the only one that is looked at.

    Args:
        asked: a configuration, resolved and checked.
        folder: where a new run would go.

    Raises:
        UserError: ``folder`` holds a run of another configuration.
    """
    if folder.config.is_file():
        if found := difference(folder.read_config(), asked):
            raise UserError(
                f"resume=auto: {folder} holds a run of another configuration ({found}); give another folder"
            )
        return folder
    output = Path(asked["output_dir"])
    if output.resolve() not in folder.path.resolve().parents[1:3]:
        return None
    for candidate in _newest_first(output):
        if not _may_be(candidate, asked):
            continue
        try:
            saved = candidate.read_config()
        except UserError:  # another project's, or damaged: not ours to go on with
            continue
        if difference(saved, asked) is None:
            return candidate
    return None


def _newest_first(output: Path) -> Iterator[RunFolder]:
    files = [file for depth in DEPTHS for file in output.glob(f"{depth}/config.yaml")]
    yield from (RunFolder(file.parent) for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True))


QUICKLY_COMPARED = ("seed", "epochs", "batch_size", "image_size")


def _may_be(folder: RunFolder, asked: Mapping[str, Any]) -> bool:
    """Whether some whole numbers are the same: reading the rest of a configuration takes some 10 ms."""
    try:
        lines = set(folder.config.read_text().splitlines())
    except (OSError, ValueError):  # not ours to go on with
        return False
    return all(f"{key}: {asked[key]}" in lines for key in QUICKLY_COMPARED if key in asked)


def difference(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """The first value of a saved configuration that changes results and is not what is asked for now, in words."""
    had, has = _flat(_comparable(saved, asked)), _flat(asked)
    own_images = has.get("dataset.source") == "image_folder"
    for key in {**has, **had}:
        if own_images and key == "dataset.root" and _same_place(had.get(key), has.get(key)):
            continue
        compared = not is_neutral(key) or (own_images and key in OF_OWN_IMAGES)
        if compared and _as_number(had.get(key, ...)) != _as_number(has.get(key, ...)):
            was, now = (f"{key}={as_typed(values[key])}" if key in values else f"no {key}" for values in (had, has))
            return f"{was}, now {now}"
    return None


def _same_place(had: Any, has: Any) -> bool:
    return os.path.realpath(str(had)) == os.path.realpath(str(has))


def _comparable(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run that searched for its cuts has saved those that it found: as good as the search that is asked for."""
    cuts = saved["split"].get("cuts")
    if "k" in asked["split"] and isinstance(cuts, list | tuple) and len(cuts) + 1 == asked["split"]["k"]:
        return {**saved, "split": asked["split"]}
    return saved


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _as_number(value: Any) -> Any:
    """So that 1 is 1.0, in lists too, but not true; a checked configuration has numbers of their declared types."""
    if isinstance(value, list | tuple):
        return [_as_number(item) for item in value]
    return float(value) if type(value) is int else value if isinstance(value, float) else (type(value), value)


def check_folder(folder: RunFolder, *, resume: bool) -> None:
    """Refuse to train where a run would be damaged, or where files of somebody else would be written to.

    Raises:
        UserError: says what is there.
    """
    if folder.path.is_dir():
        folder.check_inside()
    if folder.has_ended():
        if resume:
            raise UserError(f"resume={folder}: this run has ended, its summary.json is there")
        raise UserError(f"{folder} holds a run that has ended: give another folder, or move this one away")
    if not resume and folder.resumable():
        raise UserError(f"{folder} holds a run that was cut short: resume={folder} goes on with it, or move it away")


def take_over(folder: RunFolder, trainer: lightning.Trainer, *, resume: bool) -> Path | None:
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
    for place in (folder.path, folder.checkpoints):
        remove_parts(place)
    if not resume:
        folder.best.unlink(missing_ok=True)  # of one that was killed before its first last.ckpt
        return None
    checkpoint, batches = newest_sound(folder)
    if checkpoint is None:
        print(f"{folder}: no checkpoint yet, the run begins at its beginning")
        folder.best.unlink(missing_ok=True)
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCsv):
            logger.resume_from_step = batches
            if batches >= trainer.log_every_n_steps and not logger.path.is_file():  # type: ignore[attr-defined]
                print(f"warning: {logger.path} is gone: it begins again behind batch {batches}", file=sys.stderr)
    return checkpoint

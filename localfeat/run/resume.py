"""Resume a run: find the one that the same command began, and take over its folder."""

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
from localfeat.run.neutral import EARLIER, OF_OWN_IMAGES, is_neutral
from localfeat.run.output import tell
from localfeat.utils.errors import UserError
from localfeat.utils.files import remove_parts
from localfeat.utils.text import as_typed

DEPTHS = ("*/*", "*/*/*")
"""Paths of runs below ``output_dir``: <date>/<run>, and <date>/<sweep>/<job>."""


def earlier_run(asked: Mapping[str, Any], folder: RunFolder) -> RunFolder | None:
    """Return the newest run of the configuration ``asked``, finished or not, in ``folder`` or the output folder.

    If the user chose ``folder`` (it is not where new runs go), only that one is searched.

    Args:
        asked: a configuration, resolved and checked.
        folder: the folder that a new run would get.

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
        except UserError:  # another project's, or damaged: not ours to resume
            continue
        if difference(saved, asked) is None:
            return candidate
    return None


def _newest_first(output: Path) -> Iterator[RunFolder]:
    files = [file for depth in DEPTHS for file in output.glob(f"{depth}/config.yaml")]
    yield from (RunFolder(file.parent) for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True))


QUICKLY_COMPARED = ("seed", "epochs", "batch_size", "image_size")


def _may_be(folder: RunFolder, asked: Mapping[str, Any]) -> bool:
    """Return whether a few numbers are equal: a quick test, as reading a whole configuration takes some 10 ms."""
    try:
        lines = set(folder.config.read_text().splitlines())
    except (OSError, ValueError):  # not ours to resume
        return False
    return all(f"{key}: {asked[key]}" in lines for key in QUICKLY_COMPARED if key in asked)


def difference(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """Describe the first value that changes results and differs between a saved and a requested configuration."""
    had, has = _flat(_comparable(saved, asked)), _flat(asked)
    had = {**{key: value for key, value in EARLIER.items() if key in has}, **had}
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
    """Return ``saved`` with the requested split, if its cuts are the result of the same search."""
    split, earlier = saved["split"], EARLIER["split.downsample"]
    cuts, alike = split.get("cuts"), split.get("downsample", earlier) == asked["split"].get("downsample", earlier)
    if alike and "k" in asked["split"] and isinstance(cuts, list | tuple) and len(cuts) + 1 == asked["split"]["k"]:
        split = asked["split"]
    return {**saved, "split": split}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _as_number(value: Any) -> Any:
    """Return integers as floats, so that 1 equals 1.0 (also in lists) but not true."""
    if isinstance(value, list | tuple):
        return [_as_number(item) for item in value]
    return float(value) if type(value) is int else value if isinstance(value, float) else (type(value), value)


def check_folder(folder: RunFolder, *, resume: bool) -> None:
    """Refuse to train in a folder where a run or somebody else's files would be damaged.

    Raises:
        UserError: the folder holds another run, or a link that leads out of it.
    """
    if folder.path.is_dir():
        folder.check_inside()
    if folder.has_ended():
        if resume:
            raise UserError(f"resume={folder}: this run has ended, its summary.json is there")
        raise UserError(f"{folder} holds a run that has ended: give another folder, or move this one away")
    if not resume and folder.resumable():
        raise UserError(f"{folder} holds a run that was cut short: resume={folder} resumes it; or move it away")


def take_over(folder: RunFolder, trainer: lightning.Trainer, *, resume: bool) -> Path | None:
    """Prepare the folder for training; the caller holds its lock (see ``sole_run``).

    Args:
        folder: the run's folder; it need not hold a run.
        trainer: the trainer, whose ``MetricsCsv`` is told the step to resume from.
        resume: whether to resume the run in ``folder``.

    Returns:
        The checkpoint to resume from; None to start at the beginning.

    Raises:
        UserError: see ``check_folder``; also if all checkpoints are damaged.
    """
    check_folder(folder, resume=resume)  # again, as another process may have changed it before the lock
    for place in (folder.path, folder.checkpoints):
        remove_parts(place)
    if not resume:
        folder.best.unlink(missing_ok=True)  # left by a run that was killed before its first last.ckpt
        return None
    checkpoint, batches = newest_sound(folder)
    if checkpoint is None:
        tell(f"{folder}: no checkpoint yet, the run starts from the beginning")
        folder.best.unlink(missing_ok=True)
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCsv):
            logger.resume_from_step = batches
            if batches >= trainer.log_every_n_steps and not logger.path.is_file():  # type: ignore[attr-defined]
                print(f"warning: {logger.path} is missing: new rows begin after batch {batches}", file=sys.stderr)
    return checkpoint

"""A run's folder: the paths of its files, and how to read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from localfeat.run import trust
from localfeat.run.literal import read_yaml
from localfeat.utils.errors import UserError
from localfeat.utils.files import not_a, read_object
from localfeat.utils.text import shown

_GROUPS = ("dataset", "backbone", "split", "method")
_WANDBS_LINK = "debug-core.log"


class RunFolder:
    """A run's folder, which need not exist.

    Args:
        path: the folder's path.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.csv"
        self.summary = self.path / "summary.json"
        self.weights = self.path / "backbone.safetensors"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.checkpoints / "best.ckpt"
        self.last = self.checkpoints / "last.ckpt"
        self.previous = self.checkpoints / "previous.ckpt"
        self.overrides = self.path / ".hydra" / "overrides.yaml"

    def __str__(self) -> str:
        return str(self.path)

    def has_ended(self) -> bool:
        """Return whether the run is complete: its summary is written last."""
        return self.summary.is_file()

    def resumable(self) -> list[Path]:
        """Return the existing checkpoints to resume from, newest first, without checking their content."""
        return [file for file in (self.last, self.previous) if file.is_file()]

    def checkpoint(self, which: str) -> Path:
        """Return the checkpoint ``best`` (on validation; the last one of a run without validation) or ``last``.

        Raises:
            UserError: another name, or no such file.
        """
        if which not in ("best", "last"):
            raise UserError(f"checkpoint={which}: it is best or last")
        file = self.last if which == "last" or not (self.best.is_file() or self._validated()) else self.best
        if not file.is_file():
            raise UserError(f"there is no checkpoint {file}{self.instead_of(file)}")
        return file

    def instead_of(self, checkpoint: Path) -> str:
        """Return the end of a message about ``best.ckpt``: the checkpoint that can be used instead of it."""
        other = checkpoint == self.best and self.last.is_file()
        return "; checkpoint=last takes the weights of the last epoch" if other else ""

    def _validated(self) -> bool:
        return self.has_ended() and self.read_summary().get("val_accuracy") is not None

    def read_config(self) -> dict[str, Any]:
        """Return the plain values of ``config.yaml``, with nothing resolved.

        Targets and keys of earlier versions get their current names.

        Raises:
            UserError: not a run's folder, or a file that cannot be read.
        """
        if not os.path.isdir(self.path):
            raise UserError(f"{self} is not the folder of a run: {not_a('folder', self.path)}")
        if not self.config.is_file():
            raise UserError(f"{self} is not the folder of a run: it has no config.yaml")
        config = read_yaml(self.config)
        if not isinstance(config, dict):
            raise UserError(f"{self.config} cannot be read: it holds no keys with values")
        config = {k: trust.current_group(group) if isinstance(group, dict) else group for k, group in config.items()}
        missing = [group for group in _GROUPS if not isinstance(config.get(group), dict)]
        if missing:
            raise UserError(f"{self} is not the folder of a run: its config.yaml has no {', '.join(missing)}")
        return config

    def check_readable(self, checkpoint: str) -> None:
        """Check that this is a run's folder with a checkpoint, see :meth:`read_config` and :meth:`checkpoint`."""
        self.read_config()
        self.checkpoint(checkpoint)

    def read_summary(self) -> dict[str, Any]:
        """Return the content of the run's summary.json.

        Raises:
            UserError: the run has not ended, or the file is damaged.
        """
        if not self.has_ended():
            raise UserError(f"{self} has no summary.json: the run has not ended (resume={self} resumes it)")
        return read_object(self.summary)

    def read_overrides(self) -> list[str]:
        """Return the overrides that the run was started with, as Hydra recorded them; in a sweep, those of this job.

        Raises:
            UserError: the file cannot be read.
        """
        if not self.overrides.is_file():
            return []
        found = read_yaml(self.overrides)
        if not isinstance(found, list):
            raise UserError(f"{self.overrides} cannot be read: it holds no list")
        return [str(override) for override in found if not str(override).startswith("resume=")]

    def check_inside(self) -> None:
        """Refuse a folder with a link that leads out of it, before anything is written there.

        The link's target need not exist, because writing through the link would create it. The folder itself may be a
        link, and links within it are allowed. So is W&B's link to its service's log: W&B makes a new one at every
        start, and nothing is written through the old ones.

        Raises:
            UserError: a symbolic link leads out, or an entry is neither a file nor a folder (opening a pipe would block
                forever).
        """
        top = os.path.realpath(self.path)
        for place, folders, files in os.walk(self.path):  # does not follow links
            for name in sorted([*folders, *files]):
                path = os.path.join(place, name)
                if name == _WANDBS_LINK and Path(place).match("wandb/*/logs") and os.path.islink(path):
                    continue
                mode = os.lstat(path).st_mode
                if stat.S_ISLNK(mode) and not f"{os.path.realpath(path)}{os.sep}".startswith(f"{top}{os.sep}"):
                    raise UserError(f"{shown(path)} is a link that leads out of the run's folder: remove it")
                if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise UserError(f"{shown(path)} is neither a file nor a folder: remove it from the run's folder")

"""What a run writes stays in its folder, also if the folder comes from somebody else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from localfeat.utils.errors import UserError
from localfeat.utils.text import shown

WANDBS_LINK = "debug-core.log"


def check_inside(folder: str | Path) -> None:
    """Refuse a run's folder in which something leads out of it, before anything is written there.

    A link's target need not exist: writing to its name would make it. The folder itself may be a link, and links may
    lead to places within it. W&B's own link to its service's log is left alone: every start of W&B makes a new one, in
    a folder named after the time, and nothing is written through the old ones.

    Raises:
        UserError: names a symbolic link that leads out, or what is neither a file nor a folder (opening a pipe waits
            for ever).
    """
    folder = Path(folder)
    top = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):  # which follows no links
        for name in sorted([*folders, *files]):
            path = os.path.join(place, name)
            if name == WANDBS_LINK and Path(place).match("wandb/*/logs") and os.path.islink(path):
                continue
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode) and not f"{os.path.realpath(path)}{os.sep}".startswith(f"{top}{os.sep}"):
                raise UserError(f"{shown(path)} is a link that leads out of the run's folder: remove it")
            if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise UserError(f"{shown(path)} is neither a file nor a folder: remove it from the run's folder")

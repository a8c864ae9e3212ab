"""Weights & Biases: one run per job, offline without a login, never a question."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger  # imports wandb only when a logger is made

from localfeat.errors import UserError

MODES = ("auto", "online", "offline", "disabled")
DEFAULT_HOST = "https://api.wandb.ai"


def wandb_logger(
    project: str,
    entity: str | None = None,
    group: str | None = None,
    name: str | None = None,
    tags: Sequence[str] = (),
    job_type: str | None = None,
    save_dir: str | Path = ".",
    mode: str = "auto",
) -> WandbLogger:
    """Lightning's logger for a run of its own, which begins when the first thing is logged.

    Metrics are plotted against ``trainer/global_step``, which Lightning counts in batches. Call ``finish()`` after
    the job, or the next one in this process would log into the same run.

    Args:
        project: W&B's project; likewise ``entity``, ``group``, ``name``, ``tags``, ``job_type``.
        save_dir: where the folder ``wandb/`` goes; made if it does not exist.
        mode: "auto" obeys the variable WANDB_MODE if it is set, else is online with a login (WANDB_API_KEY or a netrc
            entry) and offline without one; offline runs can be sent later with ``wandb sync``.

    Raises:
        UserError: an unknown mode, or "online" without a login.
    """
    from wandb import Settings

    Path(save_dir).mkdir(parents=True, exist_ok=True)
    # The mode goes to wandb.init: Lightning's offline=True would set WANDB_MODE for the rest of the process.
    logger = WandbLogger(
        project=project,
        entity=entity,
        group=group,
        name=name,
        tags=list(tags),
        job_type=job_type,
        save_dir=save_dir,
        mode=resolve_mode(mode),
        settings=Settings(silent=True, console="off"),
    )
    # Lightning passes this setting always, and wandb 0.31 warns that it has no effect.
    logger._wandb_init.pop("anonymous", None)
    return logger


def resolve_mode(mode: str) -> str | None:
    """The mode for ``wandb.init``; None leaves it to WANDB_MODE."""
    if mode not in MODES:
        raise UserError(f"unknown W&B mode {mode!r}: use one of {', '.join(MODES)}")
    if mode == "online" and not has_login():
        raise UserError("W&B mode 'online' without a login: run 'wandb login', or use mode 'auto' or 'offline'")
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE", "online") != "online":
        return None
    return "online" if has_login() else "offline"


def has_login() -> bool:
    """Whether wandb would find a key without asking: WANDB_API_KEY, or an entry for its host in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", DEFAULT_HOST)).hostname
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    return any(host in netrc_hosts(file) for file in files)


def netrc_hosts(file: Path) -> set[str | None]:
    """Hosts named in a netrc file; none if it is missing or not one."""
    try:
        return set(netrc.netrc(file).hosts)
    except (OSError, netrc.NetrcParseError):
        return set()


def log_images(logger: WandbLogger, images: Mapping[str, str | Path]) -> None:
    """Uploads PNG files, name -> path, to the logger's run."""
    for name, path in images.items():
        logger.log_image(key=name, images=[str(path)])


def finish() -> None:
    """Closes the run of this process, if there is one, so that the next job gets its own.

    Also stops wandb's service process, which leaves WANDB_SERVICE in the environment as long as it runs.
    """
    import wandb

    if wandb.run is not None:
        wandb.finish()  # no ``quiet``: a TypeError in wandb 0.31
    wandb.teardown()

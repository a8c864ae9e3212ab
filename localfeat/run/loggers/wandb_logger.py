"""Weights & Biases: one run per job, offline without a login, no prompts, and no failure that stops the training."""

from __future__ import annotations

import logging
import netrc
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger  # imports wandb only when a logger is made
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from localfeat.run.loggers.deadline import NoAnswerError, within
from localfeat.run.loggers.wandb_service import LONGEST_END, abandon, line_of, seconds, warn
from localfeat.utils.errors import UserError
from localfeat.utils.files import write_whole

MODES = ("auto", "online", "offline", "disabled")
DEFAULT_HOST = "https://api.wandb.ai"
RUN_ID = Path("wandb", "run_id")
LONGEST_TAG = 64  # characters
LONGEST_CALL = 20.0  # seconds for one call of W&B during training, which only hands data to its service

AXIS = "trainer/global_step"
"""The x-axis of every metric: batches from 0, the ``step`` of metrics.csv."""

SUMMARIES: dict[str, str | None] = {
    "train/*": None,
    "train/module_*": None,
    "val/*": None,
    "val/accuracy": "max,last",
    "val/loss": "min,last",
    "test/*": None,
    "memory/*": None,
    "speed/*": None,
}
"""Pattern of metric names -> the summary shown in W&B's table of runs (None for the last value)."""


class RunLogger(WandbLogger):
    """Lightning's logger with the axis above. A row of W&B's history is a step, as in metrics.csv.

    A resumed run continues at its checkpoint's step; steps that W&B has online already are not logged again. If a call
    of W&B fails or takes longer than 20 s, a warning on stderr says so and nothing more is logged.

    Args:
        required: whether to refuse to start if W&B cannot be reached, instead of logging offline.
        reconstructions_every_n_epochs: the number of epochs between pictures of reconstructions; None for the end only.
        arguments: the arguments of Lightning's logger and ``wandb.init``.
    """

    def __init__(self, *, required: bool, reconstructions_every_n_epochs: int | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Lightning always passes this setting, and wandb 0.31 warns that it has no effect.
        self._wandb_init.pop("anonymous", None)
        self.required = required
        self.reconstructions_every_n_epochs = reconstructions_every_n_epochs
        self.lost = False
        self._step = 0

    def begin(self, folder: Path, *, resume: bool, tags: Sequence[str] = ()) -> None:
        """Start W&B's run for the run in ``folder``, or resume it.

        Args:
            folder: the run's folder, which keeps W&B's id in ``wandb/run_id``.
            resume: whether to resume the W&B run with that id, if there is one.
            tags: tags in addition to the user's own.

        Raises:
            UserError: W&B refuses a setting (project, tags, …), or is ``required`` and cannot be reached.
        """
        own = [*(self._wandb_init.get("tags") or ()), *(tag[:LONGEST_TAG] for tag in tags)]
        self._wandb_init["tags"] = list(dict.fromkeys(own))
        file = folder / RUN_ID
        if resume and (known := _run_id(file)):
            self._wandb_init["id"] = self._id = known
        run = self._started()
        if run is None or run.disabled:
            return
        self.attempt(define_metrics)
        self.attempt(lambda run: write_whole(file, f"{run.id}\n".encode()))
        if run.offline:
            print(f"W&B: offline, in {folder / 'wandb'}; wandb sync <its folder in there> uploads it")

    def _started(self) -> Any | None:
        """Return W&B's run; offline if online fails and is not ``required``; None if that fails, too."""
        import wandb
        from pydantic import ValidationError
        from wandb.errors import UsageError

        wandb.setup(wandb.Settings(silent=True))  # silences its service, too
        logging.raiseExceptions = False  # or wandb prints a stack trace for every log line on a full disk
        try:
            return self.experiment
        except (UsageError, ValidationError) as error:
            lines = [line.strip() for line in str(error).splitlines()]
            said = lines[0] if isinstance(error, UsageError) else f"{lines[1]}: {lines[2].partition(' [type=')[0]}"
            raise UserError(f"W&B refuses this run: {said}") from error
        except Exception as error:  # no network, no permission, a service that does not start …
            abandon()
            if self.required:
                raise UserError(
                    f"W&B cannot be reached ({line_of(error)}): logger.mode=auto would log offline"
                ) from error
            warn(f"W&B cannot be reached ({line_of(error)}): this run is logged offline")
        self._wandb_init["mode"] = "offline"
        try:
            return self.experiment
        except Exception as error:
            abandon()
            self._lose(f"W&B does not start offline either ({line_of(error)}): the run continues without it")
        return None

    def _lose(self, line: str) -> None:
        if not self.lost:
            self.lost = True
            warn(line)

    def attempt(self, action: Callable[[Any], object]) -> None:
        """Call ``action(run)`` with W&B's run; a failure does not affect the training."""
        if self.lost:
            return
        try:
            within(LONGEST_CALL, partial(action, self.experiment))
        except UserError:
            raise
        except Exception as error:  # wandb raises errors of its own, OSError, and plain subclasses of Exception
            if isinstance(error, NoAnswerError):
                abandon()  # every further call would wait as long
            self._lose(
                f"W&B has failed ({line_of(error)}): nothing more is logged there, and the run continues without it"
            )

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add ``metrics`` to the row of ``step`` (None for the latest row)."""
        self.attempt(lambda run: self._log(run, metrics, step))

    def _log(self, run: Any, metrics: Mapping[str, Any], step: int | None) -> None:
        self._step = max(self._step, run.starting_step) if step is None else step
        if self._step >= run.starting_step:
            run.log({**metrics, AXIS: self._step}, step=self._step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Add ``params`` to the run's configuration, nested as they are."""
        self.attempt(lambda _: super(RunLogger, self).log_hyperparams(params))


def define_metrics(run: Any) -> None:
    """Define the x-axis and the table summary of every metric in W&B."""
    for name, summary in SUMMARIES.items():
        run.define_metric(name, step_metric=AXIS, summary=summary)


def _run_id(file: Path) -> str:
    """Return the id in ``file``; empty if the file is missing or damaged."""
    text = file.read_bytes().strip() if file.is_file() else b""
    return text.decode() if text.isascii() and text.decode().isprintable() else ""


def wandb_logger(
    project: str,
    entity: str | None = None,
    group: str | None = None,
    name: str | None = None,
    tags: Sequence[str] = (),
    job_type: str | None = None,
    save_dir: str | Path = ".",
    mode: str = "auto",
    reconstructions_every_n_epochs: int | None = None,
) -> RunLogger:
    """Return the logger for a new W&B run, which starts with ``begin()`` or the first logged value.

    Call ``finish()`` after the job, or the next one in this process would log to the same W&B run.

    Args:
        project: W&B's project; likewise ``entity``, ``group``, ``name``, ``tags``, ``job_type``.
        save_dir: the parent of the folder ``wandb/``; created if missing.
        mode: "auto" obeys the variable WANDB_MODE if it is set; else it is online with a login (WANDB_API_KEY or a
            netrc entry), and offline without one or if W&B cannot be reached. "online" fails instead. ``wandb sync``
            uploads offline runs later.
        reconstructions_every_n_epochs: the number of epochs between pictures of reconstructions; None for the end only.

    Raises:
        UserError: an unknown mode, "online" without a login, a number below 1, or a time that is not a number.
    """
    from wandb import Settings

    every = reconstructions_every_n_epochs
    if every is not None and every < 1:
        raise UserError(f"logger.reconstructions_every_n_epochs={every}: it must be at least 1, or null")
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    # The mode is passed to wandb.init: Lightning's offline=True would set WANDB_MODE for the rest of the process.
    return RunLogger(
        required=mode == "online",
        reconstructions_every_n_epochs=every,
        project=project,
        entity=entity,
        group=group,
        name=name,
        tags=list(tags),
        job_type=job_type,
        save_dir=save_dir,
        mode=resolve_mode(mode),
        settings=Settings(
            silent=True,
            console="off",
            init_timeout=seconds("WANDB_INIT_TIMEOUT", 30.0),
            finish_timeout=seconds("WANDB_FINISH_TIMEOUT", LONGEST_END),
            finish_timeout_raises=True,
        ),
    )


def resolve_mode(mode: str) -> str | None:
    """Return the mode for ``wandb.init``; None leaves it to WANDB_MODE."""
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
    """Return whether wandb finds a key without asking: WANDB_API_KEY, or an entry for its host in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", DEFAULT_HOST)).hostname
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    return any(host in netrc_hosts(file) for file in files)


def netrc_hosts(file: Path) -> set[str | None]:
    """Return the hosts in a netrc file; none if the file is missing or invalid."""
    try:
        return set(netrc.netrc(file).hosts)
    except (OSError, netrc.NetrcParseError):
        return set()


def log_images(logger: WandbLogger, images: Mapping[str, str | Path]) -> None:
    """Upload PNG files, name -> path, to the logger's run."""
    for name, path in images.items():
        logger.log_image(key=name, images=[str(path)])

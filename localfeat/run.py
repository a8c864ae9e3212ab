"""Train, evaluate and write down one run: ``python -m localfeat.run method=feature_recon split=k4``.

Only light modules are imported here, so that ``--help`` and ``--cfg job`` answer at once.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from localfeat.cli import check_arguments, one_line_errors, report
from localfeat.config import plain, register_resolvers, saved_config
from localfeat.errors import UserError
from localfeat.paths import conf_dir


def run(cfg: DictConfig, folder: str | Path) -> dict[str, Any]:
    """Train what ``cfg`` says and leave everything about it in ``folder``; returns what summary.json holds.

    Raises:
        UserError: a configuration that cannot be.
    """
    from localfeat.training import train

    if cfg.resume is not None:
        resumed = str(cfg.resume)
        if not resumed:
            raise UserError("resume= is empty: give the folder of a run that was cut short")
        return train(saved_config(resumed), Path(resumed), resume=True)
    return train(plain(cfg), Path(folder), resume=False)


def _attempt(cfg: DictConfig, explain: Callable[[Exception], str | None]) -> str | None:
    """One job. What is wrong with it, if the user can mend it: a sweep goes on with its other jobs."""
    job = HydraConfig.get()
    folder, multirun = Path(job.runtime.output_dir), job.mode == RunMode.MULTIRUN
    try:
        if cfg.resume is not None:
            _check_resume(list(job.overrides.task), multirun)
        run(cfg, folder)
        return None
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        if cfg.resume is None or multirun:
            _discard(folder)
        return f"job {job.job.num} ({job.job.override_dirname}): {line}" if multirun else line


def _check_resume(overrides: list[str], multirun: bool) -> None:
    others = [override for override in overrides if not override.startswith("resume=")]
    if multirun or others:
        raise UserError(f"resume=<folder> takes the run's own configuration: leave out {' '.join(others) or '-m'}")


def _discard(folder: Path) -> None:
    """Remove the folder of a refused run, and those it lies in, as far as they hold nothing but Hydra's notes."""
    kept = {Path.cwd(), *Path.cwd().parents}
    if [path.name for path in folder.iterdir()] == [".hydra"]:
        shutil.rmtree(folder / ".hydra")
    with suppress(OSError):  # not empty
        while folder not in kept:
            folder.rmdir()
            folder = folder.parent


def main() -> None:
    """The command line."""
    refused: list[str] = []

    def job(cfg: DictConfig) -> None:
        if line := _attempt(cfg, explain):
            report(line)
            refused.append(line)

    with one_line_errors() as explain:
        check_arguments(sys.argv[1:])
        register_resolvers()
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(job)()
        if refused:
            sys.exit(2)


if __name__ == "__main__":
    # Threads that wait for others sleep instead of spinning: on a machine with other work the difference is several
    # times the speed. OpenMP reads it when torch is loaded, which has not happened yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()

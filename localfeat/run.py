"""Train, evaluate and write down one run: ``python -m localfeat.run method=feature_recon split=k4``.

Only light modules are imported here, so that ``--help`` and ``--cfg job`` answer at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from localfeat.cli import explain, one_line_errors, report
from localfeat.config import plain, register_resolvers, saved_config
from localfeat.errors import UserError
from localfeat.paths import conf_dir


def run(cfg: DictConfig, folder: str | Path) -> dict[str, Any]:
    """Train what ``cfg`` says and leave everything about it in ``folder``; returns what summary.json holds.

    Raises:
        UserError: a configuration that cannot be.
    """
    from localfeat.training import train

    if cfg.resume:
        return train(saved_config(cfg.resume), Path(cfg.resume), resume=True)
    return train(plain(cfg), Path(folder), resume=False)


@hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
def _job(cfg: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    multirun = hydra_config.mode == RunMode.MULTIRUN
    try:
        if cfg.resume:
            _check_resume(list(hydra_config.overrides.task), multirun)
        run(cfg, hydra_config.runtime.output_dir)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        if not multirun:
            report(line)
            sys.exit(2)  # Hydra would print a preface of its own
        report(f"job {hydra_config.job.num} ({hydra_config.job.override_dirname}): {line}")
        error.reported = True  # type: ignore[attr-defined]  # the sweep goes on, and ends with exit code 2
        raise


def _check_resume(overrides: list[str], multirun: bool) -> None:
    others = [override for override in overrides if not override.startswith("resume=")]
    if multirun or others:
        raise UserError(f"resume=<folder> takes the run's own configuration: leave out {' '.join(others) or '-m'}")


def main() -> None:
    """The command line."""
    register_resolvers()
    with one_line_errors():
        _job()


if __name__ == "__main__":
    main()

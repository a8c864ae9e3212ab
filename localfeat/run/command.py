"""Train, evaluate and record one run: ``python -m localfeat.run method=feature_recon split=k4``.

Heavy modules are imported inside functions, so that ``--help`` and ``--cfg job`` answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from localfeat.data.bad_files import BadImage
from localfeat.run.command_line import arranged, exit_code, one_line_errors, report
from localfeat.run.composition import AUTO, plain, register_resolvers
from localfeat.run.conf_dir import conf_dir
from localfeat.run.folder import RunFolder
from localfeat.run.hydra_guard import check_foreign
from localfeat.run.output import intention, tell
from localfeat.run.quick_imports import quick_imports
from localfeat.run.settings import check_paths, check_plain_settings
from localfeat.run.signals import name, requeue
from localfeat.utils.errors import Diverged, RunFailed, Stopped, UserError
from localfeat.utils.text import as_argument

if TYPE_CHECKING:
    from localfeat.run.configuration import RunConfiguration


def run(cfg: DictConfig, folder: str | Path, notes: dict[str, str] | None = None) -> dict[str, Any]:
    """Train one configuration, write its results to a folder, and return the content of summary.json.

    Args:
        cfg: the configuration. With ``resume=<folder>`` that run is resumed with its own configuration. With
            ``resume=auto`` the newest run of the same configuration is resumed, or its result returned if it has ended.
        folder: the folder of a new run.
        notes: further files of a new run, name -> text, see ``notes_of``.

    Raises:
        UserError: the configuration is invalid.
        RunFailed: the environment failed the run, for example with a full disk.
        Stopped: a signal stopped the run.
    """
    if cfg.resume is None:
        return _train(_configured(plain(cfg), new=True), RunFolder(folder), resume=False, notes=notes)
    if cfg.resume == AUTO:
        return _resume_or_begin({**plain(cfg), "resume": None}, RunFolder(folder), notes or {})
    resumed = str(cfg.resume)
    if not resumed:
        raise UserError("resume= is empty: give the folder of a run that was cut short, or auto")
    found = RunFolder(os.path.expanduser(resumed))
    return _train(_configured(found.read_config()), found, resume=True)


def _configured(values: dict[str, Any], *, new: bool = False) -> RunConfiguration:
    """Return the configuration; that of a run certain to be new needs its files."""
    check_plain_settings(values)
    if new:
        check_paths(values)
    tell(intention(values))  # before imports that take seconds
    with quick_imports():
        import localfeat.run.train  # noqa: F401  (all that a run needs)
        from localfeat.run.configuration import RunConfiguration

    return RunConfiguration.from_values(values)


def notes_of(cfg: DictConfig, hydra_cfg: HydraConf) -> dict[str, str]:
    """Return the files that Hydra itself writes for a job, name -> text: overrides, configuration, Hydra's settings."""
    parts = {"config": cfg, "overrides": hydra_cfg.overrides.task, "hydra": OmegaConf.create({"hydra": hydra_cfg})}
    return {f".hydra/{name}.yaml": OmegaConf.to_yaml(part) for name, part in parts.items()}


def _resume_or_begin(values: dict[str, Any], folder: RunFolder, notes: dict[str, str]) -> dict[str, Any]:
    from localfeat.run.resume import earlier_run
    from localfeat.utils.locks import check_free

    check_free(folder.path)
    configuration = _configured(values)
    found = earlier_run(configuration.values, folder)
    if found is None:
        return _train(configuration, folder, resume=False, notes=notes)
    if found.path != folder.path:
        _discard(folder.path)
        check_free(found.path)
    if found.has_ended():
        tell(f"{found}: this run has ended, nothing is left to do (without resume=auto a new run begins)")
        return found.read_summary()
    tell(f"{found}: resuming")
    return _train(_configured(found.read_config()), found, resume=True)


def _train(
    configuration: RunConfiguration, folder: RunFolder, *, resume: bool, notes: dict[str, str] | None = None
) -> dict[str, Any]:
    """Train; if the run fails or is stopped, say how to resume it."""
    from localfeat.run.train import train

    try:
        return train(configuration, folder, resume=resume, notes=notes or {})
    except Diverged:  # a resumed run would diverge again
        raise
    except BadImage as error:
        raise BadImage(f"{error}, or leave such files out: dataset.skip_bad_images=true") from error
    except (RunFailed, Stopped) as end:
        way = (
            f"; resume with: python -m localfeat.run {as_argument('resume', str(folder.path))}"
            if folder.config.is_file() and not folder.has_ended()
            else ""
        )
        if isinstance(end, RunFailed):
            raise RunFailed(f"{end}{way}") from end
        print(f"stopped by {name(end.signum)}{way}", file=sys.stderr)
        raise


def _attempt(cfg: DictConfig, explain: Callable[[Exception], str | None]) -> tuple[str, int] | None:
    """Run one job; return an error line and its exit code on failure, so that a sweep can run its other jobs."""
    job = HydraConfig.get()
    folder, multirun = Path(job.runtime.output_dir), job.mode == RunMode.MULTIRUN
    if multirun and cfg.logger is not None and (given := os.environ.pop("WANDB_RUN_ID", None)):
        print(f"warning: WANDB_RUN_ID={given} is ignored: every job of a sweep has its own W&B run", file=sys.stderr)
    try:
        if cfg.resume is not None:
            _check_resume(str(cfg.resume), list(job.overrides.task), multirun)
        run(cfg, folder, notes_of(cfg, job))
        return None
    except Stopped as stopped:
        _discard_unused(cfg, folder, multirun)
        if cfg.resume is not None and (line := requeue(stopped.signum)):
            print(line, file=sys.stderr)
        raise
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        _discard_unused(cfg, folder, multirun)
        return f"job {_name_in_sweep()}: {line}" if multirun else line, exit_code(error)


def _name_in_sweep() -> str:
    job = HydraConfig.get().job
    return f"{job.num} ({job.override_dirname})"


def _discard_unused(cfg: DictConfig, folder: Path, multirun: bool) -> None:
    """Remove the folder that Hydra made for a run that wrote nothing there."""
    if folder.is_dir() and (cfg.resume in (None, AUTO) or multirun):
        _discard(folder)


def _check_resume(resume: str, overrides: list[str], multirun: bool) -> None:
    others = [override for override in overrides if not override.startswith("resume=")]
    if others and resume != AUTO and not Path(resume, "config.yaml").expanduser().is_file():
        raise UserError(f"resume={resume}: it must be auto or the folder of a run that was cut short")
    if resume != AUTO and (multirun or others):
        raise UserError(f"resume=<folder> uses the run's own configuration: leave out {' '.join(others) or '-m'}")


def _discard(folder: Path) -> None:
    """Remove a run's folder and its parents, as far as they are empty."""
    kept = {Path.cwd(), *Path.cwd().parents}
    with suppress(OSError):  # not empty
        while folder not in kept:
            folder.rmdir()
            folder = folder.parent


def main() -> None:
    """Run the command line."""
    ended: list[str] = []
    refused: dict[str, int] = {}  # job -> exit code

    def job(cfg: DictConfig) -> None:
        ended.append(_name_in_sweep() if HydraConfig.get().mode == RunMode.MULTIRUN else "")
        if failure := _attempt(cfg, explain):
            report(failure[0])
            refused[ended[-1]] = failure[1]

    with one_line_errors() as explain:
        sys.argv[1:] = arranged(sys.argv[1:])
        register_resolvers()
        check_foreign(sys.argv[1:], conf_dir())
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(job)()
        if refused:
            if len(ended) > 1:
                report(f"{len(refused)} of {len(ended)} jobs failed: {', '.join(refused)}")
            sys.exit(max(refused.values()))

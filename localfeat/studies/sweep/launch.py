"""Run jobs with Hydra's launcher plugins: one at a time, in parallel, or on a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from localfeat.studies.sweep.task import RunJob
from localfeat.utils.errors import UserError
from localfeat.utils.text import quoted

PLUGINS = {
    "basic": None,
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
    "submitit_slurm": "hydra_plugins.hydra_submitit_launcher",
}
LONG = "10080"  # minutes, a week; submitit would end a job after an hour


def check_launcher(name: str) -> None:
    """Refuse a launcher that does not exist or is not installed.

    Raises:
        UserError: the launcher is unknown or not installed.
    """
    if name not in PLUGINS:
        raise UserError(f"launcher={name}: it is one of {', '.join(PLUGINS)}")
    plugin = PLUGINS[name]
    if plugin is not None and (find_spec("hydra_plugins") is None or find_spec(plugin) is None):
        raise UserError(f"launcher={name} is not installed: pip install 'localfeat[sweep]'")


def launch(task: RunJob, indices: Sequence[int], launcher: str, options: Sequence[str]) -> list[Exception]:
    """Run ``task`` for some of its jobs; when all have ended, return the errors of those that could not be run.

    Args:
        task: the task.
        indices: the jobs' positions in ``task.jobs``.
        launcher: a key of ``PLUGINS``.
        options: overrides like ``hydra.launcher.n_jobs=2``.

    Raises:
        UserError: the launcher does not have such an option.
    """
    from hydra.core.plugins import Plugins
    from hydra.core.utils import JobStatus
    from hydra.types import HydraContext

    with _configuration(task, launcher, options) as (config_loader, callbacks, config):
        context = HydraContext(config_loader=config_loader, callbacks=callbacks)
        plugin = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)
        returned = plugin.launch([[f"index={index}"] for index in indices], initial_job_idx=0)
    return [job._return_value for job in returned if job.status == JobStatus.FAILED]  # .return_value would raise it


@contextmanager
def _configuration(task: RunJob, launcher: str, options: Sequence[str]) -> Iterator[tuple[Any, Any, Any]]:
    """Yield a configuration with only a job's index and Hydra's own part, with its loader and callbacks."""
    from hydra import initialize
    from hydra._internal.callbacks import Callbacks
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    ConfigStore.instance().store("localfeat_sweep", {"index": 0})
    own = [
        f"hydra/launcher={launcher}",
        "hydra/hydra_logging=none",
        "hydra/job_logging=none",
        "hydra.output_subdir=null",
        "hydra.job.chdir=false",
        f"hydra.sweep.dir={quoted(str(task.folder.logs))}",
        "hydra.sweep.subdir=.",
    ]
    if launcher == "submitit_local":
        own.append(f"hydra.launcher.timeout_min={LONG}")
    GlobalHydra.instance().clear()
    try:
        with initialize(config_path=None, version_base="1.3", job_name="sweep"):
            loader = GlobalHydra.instance().config_loader()
            config = loader.load_configuration("localfeat_sweep", [*own, *options], RunMode.MULTIRUN)
            yield loader, Callbacks(config), config
    finally:
        GlobalHydra.instance().clear()

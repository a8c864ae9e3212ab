"""Run or resume the jobs of a study: ``localfeat sweep study=paper_scratch``."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localfeat.run.command_line import arranged, one_line_errors, report
from localfeat.run.composition import known_keys, unknown_key
from localfeat.run.output import reader_may_leave
from localfeat.studies.sweep.folder import StudyFolder
from localfeat.studies.sweep.launch import check_launcher, launch
from localfeat.studies.sweep.progress import Progress, ending_jobs_on_signals
from localfeat.studies.sweep.study import Job, Study, load_study, read_grid
from localfeat.studies.sweep.task import RunJob
from localfeat.utils.errors import Stopped, UserError
from localfeat.utils.text import quoted

USAGE = """
localfeat sweep study=<name or study.yaml> [folder=outputs/studies/<study>] [launcher=basic] [dry=true]
                          [job=<name>] [speed=<images/s>] [hydra.launcher.<option>=<value> …] [<override> …]

Runs every job of a study in its own process. The same command resumes the study after an interruption: finished jobs
are skipped, unfinished ones resume from their last checkpoint, failed ones without a checkpoint start again.

  study     a name below experiments/, or your own file, my_study/study.yaml, with the keys question, overrides (a list,
            for every job) and jobs (a list of lines like method=e2e,greedy_ce seed=0,1, which make all combinations)
  folder    the study's folder: a folder for every job, logs/<job>.log, study.json
  launcher  basic (one job at a time), joblib (in parallel: hydra.launcher.n_jobs=2), submitit_local,
            submitit_slurm (hydra.launcher.partition=gpu hydra.launcher.timeout_min=600 hydra.launcher.gpus_per_node=1)
  dry       true: only list the jobs with state, predicted peak memory (of a GPU, unless trainer=cpu) and estimated
            time of training steps
  speed     for dry=true: images per second of end-to-end training of the study's smallest backbone on your machine,
            instead of a measurement on this one
  job       run only this job, for example on one machine of a cluster or by a W&B agent

Overrides apply to every job. Values that occur in the study select among its jobs: seed=0 method=e2e,feature_recon.
logger=wandb makes the study a W&B group and names the runs after the jobs.
Exit code: 0 all done, 1 some failed, 2 a mistake in the arguments, 130 after Ctrl-C.
"""
OWN: dict[str, Any] = {
    "study": ...,
    "folder": None,
    "launcher": "basic",
    "dry": "false",
    "job": None,
    "speed": None,
}


@dataclass(frozen=True)
class Request:
    """A parsed command line.

    Attributes:
        study: the study.
        jobs: all jobs of the study, with the overrides of this command line.
        chosen: the jobs to run.
        folder: the study's folder.
        values: the sweep's own values by name.
        launcher_options: the overrides of Hydra's launcher.
    """

    study: Study
    jobs: list[Job]
    chosen: list[Job]
    folder: StudyFolder
    values: dict[str, Any]
    launcher_options: list[str]


def read_request(arguments: Sequence[str]) -> Request:
    """Return the request of a command line.

    Raises:
        UserError: the command line is invalid.
    """
    values, options, overrides = dict(OWN), list[str](), list[str]()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or argument.startswith("-"):
            raise UserError(f"{argument}: arguments are key=value (see --help)")
        if key in OWN:
            values[key] = os.path.expanduser(value) if key == "folder" else value
        else:
            (options if key.lstrip("+").startswith("hydra.launcher.") else overrides).append(argument)
    if values["study"] is ...:
        raise UserError("study has to be given: study=paper_scratch (see --help)")
    _check(values, overrides)
    overrides = arranged(overrides)
    study = load_study(values["study"])
    jobs = [_logged(job, study.name) for job in study.jobs(overrides)]
    chosen = [job for job in jobs if values["job"] in (None, job.name)]
    if not chosen:
        raise UserError(f"job={values['job']}: {unknown_key(values['job'], [job.name for job in jobs])}")
    folder = StudyFolder(values["folder"] or Path("outputs") / "studies" / study.name)
    return Request(study, jobs, chosen, folder, values, options)


def _check(values: dict[str, Any], overrides: Sequence[str]) -> None:
    for override in overrides:
        if override.endswith("="):
            raise UserError(f"{override}: give a value")
        key = override.lstrip("+").partition("=")[0]
        if key == "resume" or key.partition(".")[0].partition("/")[0] == "hydra":
            raise UserError(f"{override}: the sweep sets this itself; hydra.launcher.* configures the launcher")
        if difflib.get_close_matches(key, OWN, cutoff=0.75) and key not in known_keys([]):
            raise UserError(unknown_key(key, list(OWN)))  # a mistyped key of the sweep, not a key of the runs
    if values["dry"] not in ("true", "false"):
        raise UserError(f"dry={values['dry']}: it is true or false")
    if values["folder"] == "" or (values["folder"] and "${" in values["folder"]):
        raise UserError(f"folder={values['folder']}: give a folder")
    check_launcher(values["launcher"])
    parse_speed(values["speed"])


def parse_speed(text: str | None) -> float | None:
    """Return images per second as typed.

    Raises:
        UserError: not a positive number.
    """
    try:
        speed = None if text is None else float(text)
    except ValueError:
        speed = -1.0
    if speed is not None and not 0 < speed < float("inf"):
        raise UserError(f"speed={text}: it must be images per second of end-to-end training, like speed=800")
    return speed


def _logged(job: Job, study: str) -> Job:
    """Return the job; with W&B, the study as the run's group and the job as its name, unless given."""
    had = read_grid(job.overrides)
    if had.get("logger") != ["logger=wandb"]:
        return job
    names = {"logger.group": study, "logger.name": job.name}
    return Job(job.name, (*job.overrides, *(f"{k}={quoted(v)}" for k, v in names.items() if k not in had)))


def compose_all(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return every job's configuration as ``localfeat.run`` will compose it, so that mistakes show at once.

    Raises:
        hydra.errors.HydraException, omegaconf.errors.OmegaConfBaseException: an override is invalid.
    """
    from localfeat.run.plan.command import composer

    compose, known = composer(None), dict[tuple[str, ...], dict[str, Any]]()
    for job in jobs:
        if (likeness := _without_seed(job)) not in known:
            known[likeness] = compose(job.overrides)
    return [known[_without_seed(job)] for job in jobs]


def _without_seed(job: Job) -> tuple[str, ...]:
    """Return the job's overrides without those that do not matter for checks and estimates."""
    return tuple(override for override in job.overrides if not override.startswith(("seed=", "logger.name=")))


def run(request: Request) -> int:
    """Run the jobs that are not finished; return the exit code."""
    folder, states = request.folder, {}
    for job in request.chosen:
        states[job.name] = folder.state(job.name)
    pending = [i for i, job in enumerate(request.jobs) if states.get(job.name) in ("new", "unfinished")]
    elsewhere = [name for name, state in states.items() if state == "running"]
    done = [name for name, state in states.items() if state == "finished"]
    folder.write_study(request.study, request.jobs)
    task = RunJob(tuple(request.jobs), folder, uuid.uuid4().hex[:12])
    for name in elsewhere:
        print(f"{name} is skipped: another process is training it", flush=True)
    print(f"{len(states)} jobs: {len(done)} done before, {len(elsewhere)} elsewhere, {len(pending)} to run", flush=True)
    progress = Progress(task, len(states) - len(elsewhere), len(done), folder.seconds(done))
    stopped = _launch(task, pending, request, progress) if pending else None
    return _conclude(request, progress, stopped)


def _launch(task: RunJob, pending: Sequence[int], request: Request, progress: Progress) -> int | None:
    """Run the pending jobs; return the signal that stopped them, if any."""
    launcher = request.values["launcher"]
    try:
        with progress.following(), ending_jobs_on_signals(progress):
            for error in launch(task, pending, launcher, request.launcher_options):
                report(f"a job could not be run: {type(error).__name__}: {' '.join(str(error).split())}")
    except Stopped as stopped:
        return stopped.signum
    except Exception as error:  # the launcher's own: jobs that it lost count as failed
        if not progress.running and not progress.ended:
            if isinstance(error, ValueError | TypeError):  # for an option with an unusable value
                raise UserError(f"launcher={launcher}: {error} (hydra.launcher.*)") from error
            raise
        report(f"launcher={launcher}: {type(error).__name__}: {' '.join(str(error).split())}")
    finally:
        task.events.unlink(missing_ok=True)
        if launcher != "submitit_slurm":  # Slurm may start jobs later, but not after a stop
            task.stop.unlink(missing_ok=True)
    return None


def _conclude(request: Request, progress: Progress, stopped: int | None) -> int:
    """Print the last lines and return the exit code; the jobs' states are read from their folders again."""
    folder, names = request.folder, [job.name for job in request.chosen]
    states = {name: folder.state(name) for name in names}
    if stopped is not None:
        done = sum(state == "finished" for state in states.values())
        again = shlex.join(["localfeat", "sweep", *sys.argv[1:]])
        if any(state == "running" for state in states.values()):
            print("some jobs are still running on other machines; scancel ends them", flush=True)
        print(f"stopped with {done} of {len(names)} jobs done; resume with: {again}", flush=True)
        return 128 + stopped
    failed = [name for name, state in states.items() if state in ("new", "unfinished")]
    for name in failed:
        print(f"failed: {name}: {folder.log(name)}", flush=True)
    done = sum(state == "finished" for state in states.values())
    print(f"{done} of {len(names)} jobs done, {len(failed)} failed", flush=True)
    print(
        shlex.join(["localfeat", "report", str(request.values["folder"] or folder.path)]),
        flush=True,
    )
    return 1 if failed else 0


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    if not arguments or "--help" in arguments or "-h" in arguments:
        with reader_may_leave():
            print(USAGE.strip())
        return
    with one_line_errors():
        request = read_request(arguments)
        request.folder.check(request.chosen)
        configs = compose_all(request.chosen)
        if request.values["dry"] == "true":
            from localfeat.run.configuration import RunConfiguration
            from localfeat.studies.sweep.dry_run import show

            configurations = [RunConfiguration.from_values(values) for values in configs]
            show(request.study, request.chosen, configurations, request.folder, parse_speed(request.values["speed"]))
            return
        sys.exit(run(request))


if __name__ == "__main__":
    main()

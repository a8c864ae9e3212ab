"""List a study's jobs without running them, with state, predicted memory and estimated time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localfeat.run.configuration import RunConfiguration
from localfeat.studies.sweep.estimate import Costs, Finished, Speeds, cheapest, images_to_train, target
from localfeat.studies.sweep.folder import State, StudyFolder
from localfeat.studies.sweep.measure import device_of, images_per_second
from localfeat.studies.sweep.progress import duration
from localfeat.studies.sweep.study import Job, Study

GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One job in the table.

    Attributes:
        peak_bytes: the predicted peak memory; None if not known.
        seconds: the training time, estimated or, for a finished job, measured; None if not known.
        basis: the source of ``seconds``, a key of ``_BASES``.
    """

    job: Job
    state: State
    peak_bytes: int | None
    seconds: float | None
    basis: str | None


def rows(
    jobs: Sequence[Job], configurations: Sequence[RunConfiguration], folder: StudyFolder, speed: float | None
) -> list[Row]:
    """Return the table's rows, in the order of the jobs.

    Args:
        jobs: the jobs.
        configurations: the jobs' configurations.
        folder: the study's folder.
        speed: the images per second of end-to-end training with the reference backbone (``cheapest``), if known.
    """
    costs = Costs()
    configurations = [configuration.without_initial_weights() for configuration in configurations]
    states = [folder.state(job.name) for job in jobs]
    figures = [_finished(folder.summary(job.name)) if folder.left(job.name) == "finished" else None for job in jobs]
    known = [
        (configuration, run) for configuration, run in zip(configurations, figures, strict=True) if run is not None
    ]
    speeds = Speeds(costs, known, speed, images_per_second, cheapest(configurations, costs))
    found = []
    for job, configuration, state, run in zip(jobs, configurations, states, figures, strict=True):
        predicted = costs.of(configuration)
        seconds, basis = (run.seconds, "measured") if run else _estimate(configuration, speeds)
        found.append(Row(job, state, predicted and predicted[0], seconds, basis))
    return found


def _estimate(configuration: RunConfiguration, speeds: Speeds) -> tuple[float | None, str | None]:
    images, speed = images_to_train(configuration), speeds.of(configuration)
    return (None, None) if images is None or speed is None else (images / speed[0], speed[1])


def _finished(summary: Mapping[str, Any]) -> Finished | None:
    speed, seconds = summary.get("images_per_second"), summary.get("seconds")
    return Finished(speed, seconds) if speed and seconds else None


def show(
    study: Study,
    jobs: Sequence[Job],
    configurations: Sequence[RunConfiguration],
    folder: StudyFolder,
    speed: float | None,
) -> None:
    """Print the table, its totals and the sources of its figures."""
    found = rows(jobs, configurations, folder, speed)
    print(f"{study.name}: {study.question}\n")
    print(f"{'state':<10}  {'peak GiB':>8}  {'time':>10}  command")
    for row in found:
        peak = "–" if row.peak_bytes is None else f"{row.peak_bytes / GIB:.2f}"
        time = "–" if row.seconds is None else duration(row.seconds)
        print(f"{row.state:<10}  {peak:>8}  {time:>10}  {row.job.command}")
    print(f"\n{totals(found)}")
    print("\n".join(_notes(found, list(configurations))))


def totals(found: Sequence[Row]) -> str:
    """Return one line: the number of jobs by state, the time of all and of the unfinished ones, the largest peak."""
    states = Counter(row.state for row in found)
    counted = ", ".join(f"{states[state]} {state}" for state in ("new", "unfinished", "running", "finished"))
    whole = sum(row.seconds or 0 for row in found)
    left = sum(row.seconds or 0 for row in found if row.state != "finished")
    peaks = [row.peak_bytes for row in found if row.peak_bytes is not None]
    largest = f"; largest peak {max(peaks) / GIB:.2f} GiB" if peaks else ""
    return f"{len(found)} jobs ({counted}): {duration(whole)} one after the other, {duration(left)} left{largest}"


def _notes(found: Sequence[Row], configurations: Sequence[RunConfiguration]) -> list[str]:
    """Return lines that explain the figures."""
    devices = " and ".join(sorted({target(configuration) for configuration in configurations}))
    lines = [f"peak: of a training step, predicted for {devices}, without the memory that libraries use themselves"]
    lines += [
        f"time: {count} jobs {_BASES[basis].format(device=device_of(configurations[0]))}"
        for basis, count in Counter(row.basis for row in found if row.basis).items()
    ]
    lines.append("time: images × epochs ÷ images per second, without validation and waiting for data")
    if unknown := sum(row.seconds is None for row in found):
        lines.append(f"time: unknown for {unknown} jobs (torch.compile, or a dataset that must be read first)")
    return lines


_SCALED = "scaled by the predicted cost of a step (and of the backbone)"
_BASES = {
    "measured": "as measured (finished jobs, validation included)",
    "finished jobs": "by the speed of finished jobs with the same settings",
    "finished jobs of the same backbone": f"by the speed of finished jobs with the same backbone, {_SCALED}",
    "speed=": f"by speed= for end-to-end training of the smallest backbone, {_SCALED}",
    "measured here": "by a few end-to-end steps of the smallest backbone measured on this machine ({device}), "
    f"{_SCALED}; speed=<images/s> gives the speed of another machine",
}

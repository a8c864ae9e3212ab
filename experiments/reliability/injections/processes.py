"""Runs side by side, and killed worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

from experiments.reliability.forks import differences, rows_of
from experiments.reliability.injections.images import image_trial
from experiments.reliability.injections.trial import At, Child, Ended, Slow, Trial, need, one_line, succeeds, watch
from localfeat.run.folder import RunFolder


def slowly() -> None:
    """Slow runs down so that they overlap."""
    watch(Slow(0.2))


def folder_in_use(place: Path) -> str:
    """Start a second run in the folder of a running one."""
    trial = Trial(place)
    first = trial.begin(prepare=slowly)
    first.wait(lambda: rows_of(trial.folder / "metrics.csv") >= 1)
    second = trial.run(name="second")
    need(not first.ended(), "the first had ended already")
    one_line(second, 2, "is in use")
    succeeds(first.end())
    trial.identical()
    return "the second: one line, exit code 2; the first: identical"


def same_moment(place: Path) -> str:
    """Start two runs at the same moment, three times."""
    for number in range(3):
        trial = Trial(place / str(number))
        both: list[Child] = [trial.begin(prepare=slowly, name=name) for name in ("a", "b")]
        ended: list[Ended] = [child.end() for child in both]
        need(sorted(end.code for end in ended) == [0, 2], f"exit codes {[end.code for end in ended]}")
        one_line(max(ended, key=lambda end: end.code), 2, "in use")
        succeeds(min(ended, key=lambda end: end.code))
        trial.identical()
    return "three times: one trains, one is refused in one line with exit code 2; identical"


def sweeps(place: Path) -> str:
    """Run two sweeps of two jobs each in the same output folder."""
    trial = Trial(place)
    more = ["-m", "seed=0,1", "resume=null", f"output_dir={place}/out", "hydra.run.dir=none"]
    both = [trial.begin(*more, name=name) for name in ("a", "b")]
    for child in both:
        succeeds(child.end())
    folders = [file.parent for file in sorted((place / "out").rglob("summary.json"))]
    need(len(folders) == 4, f"{len(folders)} runs have ended")
    for folder in folders:
        seed = RunFolder(folder).read_config()["seed"]
        whole = Trial(place / f"seed_{seed}", *([] if seed == 0 else [f"seed={seed}"])).whole()
        found = list(differences(whole, folder))
        need(not found, f"{folder}: {'; '.join(found)}")
    return "four runs, identical to those of single commands"


def worker_killed(place: Path) -> str:
    """Kill the worker process that reads training images with SIGKILL."""
    trial = image_trial(place, "dataset.num_workers=1")

    def strike() -> None:
        newest = max(worker.pid or 0 for worker in multiprocessing.active_children())
        os.kill(newest, signal.SIGKILL)

    ended = trial.run(prepare=lambda: watch(At("on_train_batch_start", strike, 1, 1), Slow(0.05)))
    one_line(ended, 1, "DataLoader worker")
    trial.resume()
    return "one line, exit code 1; identical"


FAULTS = [
    ("a second run in the same folder", "refused in one line, exit code 2; the first identical", folder_in_use),
    ("two begin at the same moment, resume=auto", "one trains, one is refused; identical", same_moment),
    ("two -m sweeps side by side", "all runs identical", sweeps),
    ("kill -9 of a worker process", "one line, exit code 1; identical", worker_killed),
]

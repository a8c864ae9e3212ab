"""W&B dies during a run, which must end like a run without W&B."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.reliability.injections.disks import disk, fill
from experiments.reliability.injections.trial import At, Trial, need, succeeds, watch
from tests.helpers.wandb_server import serving

OFFLINE = ["logger=wandb", "logger.mode=offline"]
ONLINE = ["logger=wandb", "logger.mode=online"]


def surroundings(place: Path, **more: str) -> None:
    """Set HOME to ``place``, where no W&B login is found, and the variables in ``more``."""
    os.environ.update(HOME=str(place), WANDB_FINISH_TIMEOUT="2", **more)


def services() -> list[int]:
    """Return the W&B services that this process has started."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = file.read_text().partition("(")[2].rpartition(")")
        except OSError:  # the process has ended
            continue
        if "wandb" in name and rest.split()[1] == str(os.getpid()):
            found.append(int(file.parent.name))
    return found


def service_killed(place: Path) -> str:
    """Kill W&B's service with SIGKILL."""
    trial, note = Trial(place), place / "killed"

    def strike() -> None:
        for number in services():
            os.kill(number, signal.SIGKILL)
            note.touch()

    def prepare() -> None:
        surroundings(place)
        watch(At("on_train_batch_start", strike, 1, 2))

    ended = trial.run(*OFFLINE, prepare=prepare)
    need(note.exists(), "no service was there to be killed")
    succeeds(ended, "W&B")
    trial.identical(but="wandb")
    return "a warning, exit code 0; identical to a run without W&B"


def disk_full(place: Path) -> str:
    """Fill the disk that holds only W&B's files."""
    trial = Trial(place)
    with disk(trial.folder / "wandb", 512) as full:

        def prepare() -> None:
            surroundings(place)
            watch(At("on_train_batch_start", lambda: fill(full), 0, 2))

        succeeds(trial.run(*OFFLINE, prepare=prepare), "W&B")
        trial.identical(but="wandb")
    return "a warning, exit code 0; identical to a run without W&B"


@contextmanager
def server(place: Path) -> Iterator[tuple[int, str]]:
    """Start the stand-in for W&B's server in its own process; yield its number and address."""
    file, child = place / "address", os.fork()
    if child == 0:
        try:
            with serving() as (_, address):
                file.with_suffix(".part").write_text(address)
                file.with_suffix(".part").rename(file)
                time.sleep(120)
        finally:
            os._exit(0)
    try:
        while not file.exists():
            time.sleep(0.01)
        yield child, file.read_text()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def server_dies(place: Path) -> str:
    """Let the server die in the middle of an online run."""
    trial = Trial(place)
    with server(place) as (number, address):

        def prepare() -> None:
            surroundings(place, WANDB_API_KEY="x" * 40, WANDB_BASE_URL=address)
            watch(At("on_train_batch_start", lambda: os.kill(number, signal.SIGKILL), 1, 2))

        ended = trial.run(*ONLINE, prepare=prepare)
    succeeds(ended, "W&B")
    trial.identical(but="wandb")
    return f"a warning, exit code 0 after {ended.seconds:.0f} s; identical to a run without W&B"


GOES_ON = "goes on with a warning, exit code 0; identical"
FAULTS = [
    ("kill -9 of W&B's service", GOES_ON, service_killed),
    ("the disk of W&B's files is full", GOES_ON, disk_full),
    ("W&B's server dies (stand-in)", GOES_ON, server_dies),
]

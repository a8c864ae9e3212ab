"""Lines on standard output that survive a reader who leaves (``| head``): the training goes on without them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from localfeat.utils.sizes import in_pixels
from localfeat.utils.text import shown

WIDTH = 80
"""Columns that no line of a run exceeds, but for paths."""


def tell(line: str) -> None:
    """Print a line at once."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        silence()


def silence() -> None:
    """Send standard output to nowhere, Python's own flush at the end included."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """End the process quietly if the reader of standard output has left (``--help | head``)."""
    try:
        yield
        if sys.stdout is not None:  # closed by whoever started this process
            sys.stdout.flush()
    except BrokenPipeError as error:
        if error.filename is not None:  # not standard output
            raise
        silence()
        sys.exit(128 + signal.SIGPIPE)


def intention(values: Mapping[str, Any]) -> str:
    """Return the line that says what a configuration will train, from its plain values."""
    network = values["backbone"]
    size = values["image_size"]
    variant = (network.get("variants") or {}).get(size) if isinstance(size, int) else None
    backbone = network.get("label") or variant or network.get("name")
    method, dataset = values["method"].get("name"), values["dataset"].get("source")
    channels = values.get("in_chans", 3)
    of = {1: " in grey", 3: ""}.get(channels, f" of {channels} channels")
    return shown(f"{method} on {dataset}: {backbone} at {in_pixels(size)}{of}")


def built(parameters: int, blocks: Sequence[int], images: int, device: str) -> str:
    """Return the line that says what was built.

    Args:
        parameters: the number of parameters, auxiliary parts included.
        blocks: the blocks of each local module.
        images: the training images.
        device: the device's name.
    """
    size = f"{parameters / 1e6:.1f} M parameters"
    cut = "+".join(map(str, blocks)) if len(blocks) <= 12 else f"{min(blocks)} to {max(blocks)}"
    return f"{size}, K={len(blocks)} of {cut} blocks, {images:,} images, {device}"

"""summary.json: a run's figures, and the software and hardware it ran on."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from localfeat.utils.files import write_whole

VERSIONED = ("torch", "lightning", "timm", "torchvision", "localfeat")
NOT_FINITE = "not_finite"


@dataclass
class RunSummary:
    """The figures of one run. None means that the figure was not measured, never that it was zero."""

    method: str
    dataset: str
    backbone: str
    split: list[int]
    """Blocks per local module."""
    decoder: str | None
    seed: int
    epochs: int
    batch_size: int
    precision: str
    test_accuracy: float | None = None
    """Top-1, 0 to 1, of the weights that were best on validation; None with ``test=false``."""
    val_accuracy: float | None = None
    """Top-1, 0 to 1, at ``best_epoch``."""
    best_epoch: int | None = None
    """0-based epoch with the best validation accuracy."""
    images_per_second: float | None = None
    peak_memory_bytes: int | None = None
    peak_memory_source: str | None = None
    peak_reserved_bytes: int | None = None
    """Peak of the memory reserved by CUDA's caching allocator; None on other devices."""
    module_peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    """Peak during each local module's forward, backward and update, everything allocated at that time included."""
    seconds: float | None = None
    """Wall time of training, validation included; for a resumed run, without the work that was repeated."""
    parameters: dict[str, int] = field(default_factory=dict)
    """Number of parameters by part: backbone, auxiliary, total, module_1, …"""
    module_losses: dict[str, float] = field(default_factory=dict)
    """Mean training loss of every local module over the last epoch."""
    skipped_steps: dict[str, int] = field(default_factory=dict)
    """Steps that each module skipped because its loss or gradient was not finite: module_1, …"""
    scaler_skips: int | None = None
    """Steps skipped because 16-bit gradients overflowed, over all modules; None without a loss scale."""
    classes: list[str] = field(default_factory=list)
    """Class names, in the order of the classifier's outputs."""
    versions: dict[str, str | None] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    commit: dict[str, Any] | None = None
    command: str | None = None
    overrides: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return field name -> value, in the order of the fields."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def environment() -> dict[str, Any]:
    """Return ``versions``, ``hardware``, ``commit`` and ``command``, the fields of ``RunSummary``."""
    return {"versions": versions(), "hardware": hardware(), "commit": git_commit(), "command": command_line()}


def versions() -> dict[str, str | None]:
    """Return package versions; None for a package that runs without being installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """Return CPU model, cores this process may use, torch's threads, memory in GiB, and GPU name or None."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
    }


def cpu_model() -> str:
    """Return the processor's name, from Linux or else from Python."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Return the machine's main memory in GiB; None if the system does not report it."""
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1024**3, 1)
    except (AttributeError, ValueError, OSError):
        return None


def git_commit(source: Path | None = None) -> dict[str, Any] | None:
    """Return ``{"id", "dirty"}`` of the checkout that holds this package; None outside a checkout or without git.

    The working directory does not matter. The file must be tracked, or an environment inside another project's
    checkout would report that project's commit. ``dirty``: tracked files differ from the commit.
    """
    source = source or Path(__file__).resolve()
    if git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    commit = git(source.parent, "rev-parse", "HEAD")
    status = git(source.parent, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or status is None else {"id": commit, "dirty": bool(status)}


def git(folder: Path, *arguments: str) -> str | None:
    """Return the output of a git command run in ``folder``; None if it fails or git is not installed."""
    # Inside a git hook, GIT_DIR and similar variables would point to the hook's repository.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, env=clean, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command_line() -> str:
    """Return the command as typed, quoted for a shell; ``python -m module`` is kept."""
    return shlex.join(sys.orig_argv)


def write_summary(path: str | Path, summary: RunSummary | Mapping[str, Any]) -> list[str]:
    """Write ``summary`` as JSON, whole or not at all, in the given order.

    JSON has no NaN and no infinity: such numbers become null, and their dotted names are listed under
    ``"not_finite"`` in the file and returned.

    Raises:
        TypeError: a value is neither a number, text, None, path, nor a mapping or sequence of these.
    """
    content = summary.to_dict() if isinstance(summary, RunSummary) else summary
    not_finite: list[str] = []
    plain = to_json(content, "", not_finite)
    if not_finite:
        plain[NOT_FINITE] = not_finite
    text = json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_whole(path, text.encode())
    return not_finite


def to_json(value: Any, name: str, not_finite: list[str]) -> Any:
    """Return ``value`` in strict JSON's types; append dotted names of NaN and infinite numbers to ``not_finite``."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a scalar of torch or NumPy
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        not_finite.append(name)
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item, f"{name}.{key}".lstrip("."), not_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item, f"{name}.{index}", not_finite) for index, item in enumerate(value)]
    raise TypeError(f"summary value {name!r} is a {type(value).__name__}, which JSON cannot hold")

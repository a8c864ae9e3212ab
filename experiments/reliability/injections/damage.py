"""A run's files are damaged or deleted while it is not training."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from experiments.reliability.injections.trial import Trial, need, one_line, succeeds
from localfeat.run.evaluate import main as evaluate


def half(file: Path) -> None:
    """Cut the file in half."""
    os.truncate(file, file.stat().st_size // 2)


def bit(file: Path) -> None:
    """Flip one bit in the middle of the file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def zeros(file: Path) -> None:
    """Overwrite the file with zeros of the same length."""
    file.write_bytes(bytes(file.stat().st_size))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files but locks and Hydra's notes."""
    files = (file for file in folder.rglob("*") if file.is_file() and ".hydra" not in file.parts)
    return {str(file): file.read_bytes() for file in files if file.name != ".lock"}


def last_checkpoint(damage: Callable[[Path], None]) -> Callable[[Path], str]:
    """Return a fault that damages ``last.ckpt`` of an interrupted run."""

    def make(place: Path) -> str:
        trial = Trial(place)
        trial.kill_midway()
        damage(trial.folder / "checkpoints" / "last.ckpt")
        ended = trial.run()
        succeeds(ended, "last.ckpt cannot be read", "replaces it")
        trial.identical()
        return "a warning, the one before takes its place; identical"

    return make


def missing_checkpoint(place: Path) -> str:
    """Delete ``last.ckpt``; ``previous.ckpt`` stays."""
    trial = Trial(place)
    trial.kill_midway()
    (trial.folder / "checkpoints" / "last.ckpt").unlink()
    trial.resume()
    return "the one before takes its place; identical"


def all_checkpoints(place: Path) -> str:
    """Damage both checkpoints."""
    trial = Trial(place)
    trial.kill_midway()
    for name in ("last", "previous"):
        bit(trial.folder / "checkpoints" / f"{name}.ckpt")
    before = contents(trial.folder)
    one_line(trial.run(), 2, "last.ckpt cannot be read", "previous.ckpt cannot be read")
    need(contents(trial.folder) == before, "files have changed")
    shutil.rmtree(trial.folder / "checkpoints")
    trial.resume()
    return "one line, exit code 2, no file changes; without them it begins anew and is identical"


def cut_row(place: Path) -> str:
    """Cut the row of a batch after the checkpoint."""
    trial = Trial(place)
    trial.kill_midway()
    file = trial.folder / "metrics.csv"
    os.truncate(file, file.stat().st_size - 20)
    succeeds(trial.run())
    trial.identical()
    return "it comes again; identical"


def no_rows(place: Path) -> str:
    """Delete metrics.csv, whose rows cannot be written again."""
    trial = Trial(place)
    trial.kill_midway()
    (trial.folder / "metrics.csv").unlink()
    succeeds(trial.run(), "metrics.csv")
    trial.readable()
    return "a warning; goes on with the rows from then on"


def configuration(place: Path) -> str:
    """Replace config.yaml with bad YAML, nothing, and half of itself."""
    trial = Trial(place)
    trial.kill_midway()
    file = trial.folder / "config.yaml"
    sound = file.read_bytes()
    for content in (b"seed: [", b"", sound[: len(sound) // 2]):
        file.write_bytes(content)
        before = contents(trial.folder)
        one_line(trial.run(), 2, "config")
        need(contents(trial.folder) == before, "files have changed")
    file.write_bytes(sound)
    trial.resume()
    return "one line, exit code 2, no file changes; mended: identical"


def ended_run(trial: Trial) -> None:
    """Turn ``folder`` into a completed run."""
    shutil.copytree(trial.whole(), trial.folder)


def damaged_summary(place: Path) -> str:
    """Damage summary.json of a completed run."""
    trial = Trial(place)
    ended_run(trial)
    file = trial.folder / "summary.json"
    sound = file.read_bytes()
    for content in (sound[: len(sound) // 2], b"", b"\xff\xfe", b"[]"):
        file.write_bytes(content)
        one_line(trial.run(), 2, "summary.json")
        succeeds(trial.run(f"run={trial.folder}", entry=evaluate))  # it does not need it
        need(file.read_bytes() == content, "it has changed")
    file.unlink()
    trial.resume()
    return "resume=auto: one line, exit code 2; evaluate scores it; deleted, the run ends once more, identical"


def damaged_best(place: Path) -> str:
    """Damage best.ckpt before evaluate reads it."""
    trial = Trial(place)
    ended_run(trial)
    file = trial.folder / "checkpoints" / "best.ckpt"
    sound = file.read_bytes()
    expected = trial.run(f"run={trial.folder}", entry=evaluate)
    succeeds(expected)
    for damage in (half, bit, zeros):
        damage(file)
        one_line(trial.run(f"run={trial.folder}", entry=evaluate), 2, "best.ckpt cannot be read")
        file.write_bytes(sound)
    again = trial.run(f"run={trial.folder}", entry=evaluate)
    succeeds(again)
    need(again.output == expected.output, "evaluate says something else")
    return "one line, exit code 2; mended: the same figures"


def damaged_weights(place: Path) -> str:
    """Damage the file of initial weights before it is loaded."""
    trial = Trial(place)
    file = place / "weights.safetensors"
    for damage in (half, zeros):
        shutil.copyfile(trial.whole() / "backbone.safetensors", file)
        damage(file)
        one_line(trial.run(f"backbone.weights={file}"), 2, "weights.safetensors")
        need(not trial.folder.exists(), "a folder is left")
    return "one line, exit code 2, no folder"


TAKES_PLACE = "a warning, the one before takes its place; identical"
REFUSED = "one line, exit code 2; mended: identical"
FAULTS = [
    ("last.ckpt is cut", TAKES_PLACE, last_checkpoint(half)),
    ("one bit of last.ckpt is wrong", TAKES_PLACE, last_checkpoint(bit)),
    ("last.ckpt is all zeros", TAKES_PLACE, last_checkpoint(zeros)),
    ("last.ckpt is missing", "the one before takes its place; identical", missing_checkpoint),
    ("last.ckpt and previous.ckpt are damaged", "one line, exit code 2", all_checkpoints),
    ("metrics.csv ends in the middle of a row", "identical", cut_row),
    ("metrics.csv is missing on resume", "goes on with a warning", no_rows),
    ("config.yaml is damaged", REFUSED, configuration),
    ("summary.json is damaged", REFUSED, damaged_summary),
    ("best.ckpt is damaged before evaluate", REFUSED, damaged_best),
    ("the file of backbone.weights= is damaged", "one line, exit code 2", damaged_weights),
]

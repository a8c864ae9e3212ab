"""Hostile files, and the means to see that they did nothing."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.command_line import call, said_at_once

MODULE = """
import pathlib
pathlib.Path({marker!r}).touch()
from os import mkdir
from localfeat import HeadAndDecoder
class Mine(HeadAndDecoder):
    pass
def make(**values):
    return values
"""


@contextmanager
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a file that exists once the module ``hostile`` or a hostile pickle has run, or the network was used."""
    path = tmp_path / "it_ran"
    (tmp_path / "hostile.py").write_text(MODULE.format(marker=str(path)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def reached(*arguments: Any, **keywords: Any) -> None:
        path.touch()
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", reached)
    monkeypatch.setattr(socket.socket, "connect", reached)
    yield path
    sys.modules.pop("hostile", None)


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, *arguments: str, code: int = 2
) -> str:
    """Run a command that must be refused; return its single line on stderr."""
    assert call(monkeypatch, module, *arguments) == code
    printed = capsys.readouterr()
    assert said_at_once(printed.out) and printed.err.startswith("error: ") and len(printed.err.splitlines()) == 1
    return printed.err


class Bomb:
    """An object whose unpickling creates a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("it_ran",)


def zip_with_pickle(path: Path) -> None:
    torch.save({"state_dict": Bomb(), "global_step": 1}, path)


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Bomb(), "global_step": 1}))


def legacy_file(path: Path) -> None:
    torch.save({"state_dict": Bomb(), "global_step": 1}, path, _use_new_zipfile_serialization=False)


def unpacks_to_much(path: Path) -> None:
    torch.save({"a": torch.zeros(2**20)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    assert path.stat().st_size < 2**16


def script(path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1)), path)


PICKLES = [zip_with_pickle, bare_pickle, legacy_file, unpacks_to_much]

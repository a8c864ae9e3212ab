"""Generated command lines: valid ones train, invalid ones give one line, and none gives a stack trace."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from localfeat.data.datamodule import ImageDataModule
from localfeat.run import process
from localfeat.run.composition import unknown_key
from tests.helpers.command_line import call, said_at_once
from tests.helpers.generated import KEYS, OTHERS, SHORT, Mistake, anything, invalid, keys_of, mistyped, valid
from tests.helpers.whole_runs import draw_nothing


@dataclass
class Ended:
    """A command's exit code, output and files."""

    code: int
    out: str
    err: str
    files: list[str]
    read_data: bool


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[list[str]], Ended]]:
    """Return a function that runs ``localfeat.run`` in an empty folder without network, GPU or W&B login."""

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise socket.gaierror("no network")

    reads: list[str] = []
    setup = ImageDataModule.setup
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(process.gc, "collect", lambda: 0)
    monkeypatch.setattr(ImageDataModule, "setup", lambda self, stage: reads.append(stage) or setup(self, stage))
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    draw_nothing(monkeypatch)

    def run(overrides: list[str]) -> Ended:
        reads.clear()
        out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    code = call(monkeypatch, "run", *SHORT, *overrides)
            finally:
                os.chdir(before)
            files = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")]
        return Ended(code, out.getvalue(), err.getvalue(), files, bool(reads))

    yield run


def check_trained(ended: Ended) -> None:
    assert (ended.code, ended.err) == (0, "")
    assert len([file for file in ended.files if file.endswith("/summary.json")]) == 1
    assert len([file for file in ended.files if file.endswith("/backbone.safetensors")]) == 1


def check_refused(ended: Ended) -> None:
    assert ended.code == 2 and said_at_once(ended.out), ended.err
    assert ended.err.startswith("error: ") and ended.err.endswith("\n") and len(ended.err.splitlines()) == 1
    assert ended.files == []


def check_mistake(ended: Ended, mistake: Mistake) -> None:
    check_refused(ended)
    assert not (mistake.early and ended.read_data), "refused only after the data were read"


def check_either(ended: Ended) -> None:
    if ended.code == 0:
        check_trained(ended)
    else:
        check_refused(ended)


def examples(count: int) -> Callable[[Any], Any]:
    """Return hypothesis settings: the same examples every time, and no shrinking, which would take minutes."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@given(overrides=valid())
@examples(3)
@pytest.mark.slow
def test_what_is_right_trains(command: Callable[[list[str]], Ended], overrides: list[str]) -> None:
    check_trained(command(overrides))


@given(mistake=invalid())
@examples(6)
def test_what_is_wrong_is_one_line(command: Callable[[list[str]], Ended], mistake: Mistake) -> None:
    check_mistake(command(mistake.overrides), mistake)


@given(overrides=anything())
@examples(4)
def test_anything_trains_or_is_one_line(command: Callable[[list[str]], Ended], overrides: list[str]) -> None:
    check_either(command(overrides))


FOUND = {
    "epochs=" + "9" * 5000: "Exceeds the limit (4300 digits)",
    "output_dir='a\x00b'": "output_dir='a\\x00b/",
    "method.name='a/../../b'": "is part of a folder's name",
    f"method.name={'a' * 300}": "is part of a folder's name",
    f"backbone.weights={'a' * 5000}": "backbone.weights=aaa",
    "backbone.weights='a\x00b'": "backbone.weights=a\\x00b: there is no such file",
    "backbone.arguments.embed_dim=0": "cannot be built like this",  # without torch's warning before it
}
"""Mistakes that once gave more than one line."""


@pytest.mark.parametrize("override", FOUND, ids=lambda text: text[:30].encode("unicode_escape").decode())
def test_what_was_found_once(command: Callable[[list[str]], Ended], override: str) -> None:
    ended = command([override])
    check_mistake(ended, Mistake([override], early=True))
    assert FOUND[override] in ended.err and ended.err.rstrip("\n").isprintable()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(overrides=valid())
@examples(60)
def test_much_that_is_right_trains(command: Callable[[list[str]], Ended], overrides: list[str]) -> None:
    check_trained(command(overrides))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(mistake=invalid())
@examples(80)
def test_much_that_is_wrong_is_one_line(command: Callable[[list[str]], Ended], mistake: Mistake) -> None:
    check_mistake(command(mistake.overrides), mistake)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(overrides=anything())
@examples(40)
def test_much_of_anything_trains_or_is_one_line(command: Callable[[list[str]], Ended], overrides: list[str]) -> None:
    check_either(command(overrides))


@pytest.mark.parametrize("split", ["k4", "balanced", "cuts"])
def test_every_key_has_values_here(split: str) -> None:
    """A new key in conf/ must be added to tests/helpers/generated.py."""
    assert set(keys_of("method=feature_recon", f"split={split}", "decoder=interp")) - OTHERS <= KEYS.keys()


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_a_mistyped_key_is_suggested(data: st.DataObject) -> None:
    """For any edit of one letter, the intended key is among the suggestions."""
    known = keys_of("method=feature_recon", "decoder=interp")
    key = data.draw(st.sampled_from(sorted(known)))
    typed = data.draw(mistyped(key, known))
    line = unknown_key(typed, known)
    assert line.startswith(f"{typed}: there is no such key; did you mean ")
    assert key in line.removesuffix("?").split("did you mean ")[1].split(" or ")

"""The output on a terminal and in a log file."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import rich
from rich.console import Console

from localfeat.run.callbacks.throughput import Throughput
from localfeat.run.console import PatientConsole, RunProgress, final_table
from localfeat.run.summary import RunSummary
from tests.helpers.tiny import TinyLearner, loader, trainer
from tests.helpers.whole_runs import child_exit, lose_reader

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def a_summary(**changes: object) -> RunSummary:
    fields: dict = {"method": "e2e", "dataset": "digits", "backbone": "b", "split": [4], "decoder": None, "seed": 0}
    return RunSummary(**{**fields, "epochs": 1, "batch_size": 8, "precision": "32-true", **changes})


def test_without_a_terminal_there_is_one_plain_line_per_epoch(tmp_path: Path) -> None:
    text = io.StringIO()
    progress = RunProgress(Console(file=text, width=80))
    run = trainer(tmp_path, callbacks=[Throughput(), progress], max_epochs=3, enable_progress_bar=True)
    run.fit(TinyLearner(), loader(4), loader(1))
    lines = text.getvalue().splitlines()
    assert len(lines) == 3
    assert not CONTROL.search(text.getvalue())
    pattern = r"epoch 3/3  loss \d\.\d{4}  val accuracy \d+\.\d\d %  images/s [\d,]+"
    assert re.fullmatch(pattern, lines[2]), lines[2]


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    text = io.StringIO()
    progress = RunProgress(Console(file=text))
    run = trainer(tmp_path, callbacks=[progress], max_epochs=1, enable_progress_bar=True)
    progress.disable()
    run.fit(TinyLearner(), loader(2))
    assert text.getvalue() == ""


def test_a_terminal_keeps_the_lines_above_a_bar_of_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.reconfigure", lambda **_: None)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: terminal)
    progress = RunProgress(terminal)
    run = trainer(tmp_path, callbacks=[Throughput(), progress], max_epochs=12, enable_progress_bar=True)
    run.fit(TinyLearner(), loader(4), loader(1))
    written = terminal.file.getvalue()
    assert "\x1b[" in written
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written))]
    pattern = r"epoch (\d+)/12  loss \d\.\d{4}  val accuracy \d+\.\d\d %  images/s [\d,]+"
    assert [found[1] for line in lines if (found := re.fullmatch(pattern, line))] == [str(n) for n in range(1, 13)]
    bars = [line for line in lines if "━" in line]
    assert any(re.match(r"epoch 12/12 .* 4/4 .*it/s +loss: \d\.\d{4}$", bar) for bar in bars)
    assert max(map(len, lines)) <= 80 and not any("v_num" in bar for bar in bars)
    assert rich.get_console() is not terminal


def test_reading_metrics_does_not_happen_at_every_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=160)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.reconfigure", lambda **_: None)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: terminal)
    monkeypatch.setattr("localfeat.run.console.SECONDS_BETWEEN_READINGS", 1e9)
    progress, readings = RunProgress(terminal), []
    monkeypatch.setattr("localfeat.run.console.epoch_figures", lambda _: readings.append(1) or {})
    run = trainer(tmp_path, callbacks=[progress], max_epochs=1, enable_progress_bar=True)
    run.fit(TinyLearner(), loader(50))
    assert 1 <= len(readings) <= 3


def test_final_table_shows_the_figures_and_the_folder() -> None:
    text = io.StringIO()
    figures = {"test_accuracy": 0.98765, "images_per_second": 1234.5, "peak_memory_bytes": 3 * 2**29}
    parts = {"backbone": 1000, "auxiliary": 234, "total": 1234, "module_1": 1234}
    summary = a_summary(**figures, peak_memory_source="torch.cuda.max_memory_allocated", parameters=parts)
    folder = f"runs/[a]/{'deep/' * 30}"
    final_table(summary, folder, Console(file=text, width=100))
    assert [line.rstrip() for line in text.getvalue().splitlines()] == [
        "test accuracy  98.77 %",
        "images/s       1,234",
        "peak memory    1.500 GiB (torch.cuda.max_memory_allocated)",
        "parameters     1,234 (backbone 1,000, auxiliary 234)",
        f"folder         {folder}",  # in one line, however long
    ]


def test_a_part_of_the_test_set_is_named() -> None:
    text = io.StringIO()
    console = Console(file=text, width=100)
    final_table(a_summary(test_accuracy=0.5), "run", console, scored="on 32 of 359 images")
    assert text.getvalue().splitlines()[0].rstrip() == "test accuracy  50.00 % (on 32 of 359 images)"


@pytest.mark.parametrize(
    ("by_module", "expected"),
    [
        ({}, "1.500 GiB (counted)"),
        ({"module_1": 3 * 2**29}, "1.500 GiB (counted)"),  # a single module is not named
        ({f"module_{n}": (2 + (n == 7)) * 2**29 for n in range(1, 13)}, "1.500 GiB, module_7 (counted)"),
    ],
)
def test_of_the_modules_memory_the_table_names_the_heaviest(by_module: dict[str, int], expected: str) -> None:
    figures = {"peak_memory_bytes": 3 * 2**29, "peak_memory_source": "counted"}
    text = io.StringIO()
    final_table(a_summary(**figures, module_peak_memory_bytes=by_module), "run", Console(file=text, width=100))
    assert text.getvalue().splitlines()[0].rstrip() == f"peak memory  {expected}"


def test_figures_that_were_not_taken_are_left_out() -> None:
    text = io.StringIO()
    final_table(a_summary(), "run", Console(file=text, width=100))
    assert text.getvalue().split() == ["folder", "run"]


def test_a_reader_that_has_gone_does_not_end_the_run() -> None:
    """As with ``| head -1``; rich would exit the process."""

    def print_twice() -> None:
        lose_reader(1)
        console = PatientConsole()
        console.print("epoch 1")
        console.print("epoch 2")
        print("more", flush=True)
        assert console.quiet

    assert child_exit(print_twice) == 0

"""Lines on standard output: what they say, and a reader who leaves."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from localfeat.run.composition import plain
from localfeat.run.output import WIDTH, built, intention, tell
from tests.helpers.project import ROOT
from tests.helpers.whole_runs import child_exit, composed, lose_reader


def test_the_first_line_says_what_will_be_trained() -> None:
    line = intention(composed("dataset=cifar100", "method=image_recon"))
    assert line == "image_recon on cifar100: swin_tiny_patch4_window7_224 at 224 px"
    assert len(line) <= WIDTH
    large = intention(plain(composed("dataset=cifar10", "backbone=swin_base", "image_size=384")))
    assert large == "feature_recon on cifar10: swin_base_patch4_window12_384 at 384 px"


def test_the_second_line_says_what_was_built() -> None:
    line = built(28_288_354, [2, 2, 6, 2], 45_000, "NVIDIA H100 80GB HBM3")
    assert line == "28.3 M parameters, K=4 of 2+2+6+2 blocks, 45,000 images, NVIDIA H100 80GB HBM3"
    assert built(5_000_000, [2] * 3 + [1] * 18, 9, "cpu") == "5.0 M parameters, K=21 of 1 to 2 blocks, 9 images, cpu"
    assert len(line) <= WIDTH


def test_a_line_nobody_reads_ends_nothing() -> None:
    def tell_twice() -> None:
        lose_reader(1)
        tell("first")
        tell("second")

    assert child_exit(tell_twice) == 0


@pytest.mark.parametrize("typed", [["--help"], ["run", "--help"], ["plan", "--help"], ["run", "--cfg", "job"]])
def test_head_is_quiet(typed: list[str]) -> None:
    """The reader has gone before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        ended = subprocess.run(
            [sys.executable, "-m", "localfeat", *typed], cwd=ROOT, stdout=gone, stderr=subprocess.PIPE, text=True
        )
    assert ended.stderr == "" and ended.returncode == 141


def test_a_process_without_standard_output_ends_well() -> None:
    command = f"{sys.executable} -m localfeat --help >&-"
    ended = subprocess.run(command, shell=True, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")

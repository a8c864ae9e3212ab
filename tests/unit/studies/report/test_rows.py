"""What makes a row, what it is called, what it is compared with; on folders written as runs write them."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from localfeat.studies.report.provenance import notes
from localfeat.studies.report.rows import Row, Table, rows, tables
from localfeat.studies.report.runs import read_runs
from tests.helpers.written import written_run

CURVE = [0.5, 0.6]
TEN = list("abcdefghij")
LOCAL = ["method=feature_recon", "split=k4"]


def table_of(folder: Path, *runs: list[str], accuracies: tuple[float, ...] = ()) -> Table:
    """The only table that runs with these overrides make."""
    values = accuracies or tuple(0.9 + index / 100 for index in range(len(runs)))
    for index, (own, accuracy) in enumerate(zip(runs, values, strict=True)):
        written_run(folder / str(index), ["dataset=cifar10", "epochs=2", *own], CURVE, test_accuracy=accuracy)
    (found,) = tables(read_runs([folder]))
    return found


def names(found: Table) -> list[str]:
    return [row.label for row in found.rows]


def test_only_the_seed_and_what_changes_no_result_may_differ_within_a_row(tmp_path: Path) -> None:
    same = ["dataset.num_workers=1", "callbacks.progress_bar=false", "logger=wandb", "output_dir=elsewhere"]
    found = table_of(tmp_path, [*LOCAL, "seed=0"], [*LOCAL, "seed=1", *same], [*LOCAL, "seed=2", "dataset.root=there"])
    (row,) = found.rows
    assert row.label == "feature_recon" and row.std == pytest.approx(stdev([0.90, 0.91, 0.92]))
    assert row.accuracy_of_seed == {0: 0.90, 1: 0.91, 2: 0.92}


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        ([], ["batch_size=64"], ["batch_size=128 lr=0.000125", "batch_size=64 lr=6.25e-05"]),
        (["decoder=interp"], ["decoder=deconv"], ["decoder=interp", "decoder=deconv"]),
        (["method.temperature=0.2"], [], ["temperature=0.2", "temperature=0.1"]),
        ([], ["callbacks.ema=0.999"], ["ema=null", "ema=0.999"]),
        ([], ["efficiency=checkpoint"], ["recompute=none", "recompute=checkpoint"]),
        ([], ["method.reconstruction_weight=[2,1]"], ["reconstruction_weight=[3,1]", "reconstruction_weight=[2,1]"]),
    ],
)
def test_a_setting_that_differs_is_in_the_label(
    tmp_path: Path, first: list[str], second: list[str], labels: list[str]
) -> None:
    found = table_of(tmp_path, [*LOCAL, *first], [*LOCAL, *second])
    assert names(found) == [f"feature_recon {label}" for label in labels]


def test_cuts_are_named_where_the_number_of_modules_does_not_tell(tmp_path: Path) -> None:
    written_run(tmp_path / "a", ["dataset=cifar10", *LOCAL], CURVE, test_accuracy=0.9)
    written_run(tmp_path / "b", ["dataset=cifar10", *LOCAL], CURVE, test_accuracy=0.9, split=[3, 3, 3, 3])
    (found,) = tables(read_runs([tmp_path]))
    assert names(found) == ["feature_recon blocks=2+2+6+2", "feature_recon blocks=3+3+3+3"]


def test_what_a_method_does_not_use_makes_no_rows(tmp_path: Path) -> None:
    """End-to-end training has neither split nor decoder; a method without target has no decoder."""
    whole = [["method=e2e", "split=k4", "seed=0"], ["method=e2e", "split=k2", "decoder=deconv", "seed=1"]]
    greedy = [["method=greedy_ce", "seed=0"], ["method=greedy_ce", "decoder=interp", "seed=1"]]
    assert names(table_of(tmp_path, *whole, *greedy)) == ["e2e", "greedy_ce"]


def test_a_setting_that_is_not_the_methods_default_is_named_even_alone(tmp_path: Path) -> None:
    found = table_of(tmp_path, [*LOCAL, "method.supervision=cross_entropy"], ["method=e2e"])
    assert names(found) == ["e2e", "feature_recon supervision=cross_entropy"]


@pytest.mark.parametrize("other", ["image_size=160", "epochs=3", "backbone=swin_small", "test=false", "dataset=svhn"])
def test_what_cannot_be_compared_stands_in_another_table(tmp_path: Path, other: str) -> None:
    for index, own in enumerate(([], [other])):
        accuracy = None if "test=false" in own else 0.9
        written_run(tmp_path / str(index), ["dataset=cifar10", "epochs=2", *own], CURVE, test_accuracy=accuracy)
    found = tables(read_runs([tmp_path]))
    assert len(found) == 2 and found[0].title != found[1].title


def test_image_folders_of_different_names_are_different_data(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        own = ["dataset=image_folder", f"dataset.root=/somewhere/{name}", "backbone=swin_micro", "image_size=32"]
        written_run(tmp_path / name, own, CURVE, test_accuracy=0.9)
    assert [table.title[:17] for table in tables(read_runs([tmp_path]))] == ["image folder cats", "image folder dogs"]


def test_a_seed_that_was_run_twice_counts_once_and_is_marked(tmp_path: Path) -> None:
    found = table_of(tmp_path, ["seed=0"], ["seed=0"], ["seed=1"], accuracies=(0.5, 0.6, 0.75))
    (row,) = found.rows
    assert row.accuracy_of_seed == {0: pytest.approx(0.55), 1: 0.75}
    assert row.mean == pytest.approx(0.65) and row.std == pytest.approx(stdev([0.55, 0.75]))
    assert "seed 0 was run 2 times (50.00, 60.00 %) and counts once, with their mean" in notes(found).texts.values()


def test_of_several_end_to_end_rows_the_nearest_is_compared_with_and_named(tmp_path: Path) -> None:
    whole = [["method=e2e", "efficiency=none"], ["method=e2e", "efficiency=checkpoint"]]
    found = table_of(tmp_path, *whole, [*LOCAL, "efficiency=checkpoint"], accuracies=(0.9, 0.8, 0.85))
    row = found.rows[2]
    assert found.baseline(row) is found.rows[1] and found.to_baseline(row) == pytest.approx(5)
    assert "compared with row 2, e2e recompute=checkpoint" in notes(found).texts.values()
    assert found.baseline(found.rows[0]) is None


def test_the_same_folder_twice_is_one_run(tmp_path: Path) -> None:
    table_of(tmp_path / "a", LOCAL)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert len(read_runs([tmp_path / "a", tmp_path / "a" / "0", tmp_path, tmp_path / "link"])) == 1


def test_rows_for_notebooks(tmp_path: Path) -> None:
    table_of(tmp_path, LOCAL, ["method=e2e"])
    found = rows(read_runs([tmp_path]))
    assert all(isinstance(row, Row) for row in found) and [row.method for row in found] == ["e2e", "feature_recon"]


def test_a_copied_study_keeps_its_rows(tmp_path: Path) -> None:
    """No figure depends on where the folders lie."""
    before = table_of(tmp_path / "a", [*LOCAL, "seed=0"], [*LOCAL, "seed=1"], ["method=e2e"])
    shutil.copytree(tmp_path / "a", tmp_path / "z" / "b")
    (after,) = tables(read_runs([tmp_path / "z"]))
    assert [(r.label, r.mean, r.std) for r in before.rows] == [(r.label, r.mean, r.std) for r in after.rows]


def test_flops_and_the_distance_at_equal_flops(tmp_path: Path) -> None:
    """A local method of 4 epochs is compared with end-to-end training between its 4 and 8 epochs."""
    for epochs, accuracy in ((4, 0.60), (8, 0.70)):
        own = ["dataset=cifar10", "method=e2e", f"epochs={epochs}"]
        written_run(tmp_path / f"e2e{epochs}", own, [0.5] * epochs, test_accuracy=accuracy, classes=TEN)
    for name in ("greedy_ce", "auglocal"):
        written_run(
            tmp_path / name,
            ["dataset=cifar10", f"method={name}", "epochs=4"],
            [0.5] * 4,
            test_accuracy=0.65,
            classes=TEN,
        )
    written_run(
        tmp_path / "longer",
        ["dataset=cifar10", "method=greedy_ce", "epochs=8"],
        [0.5] * 8,
        test_accuracy=0.65,
        classes=TEN,
    )
    four, eight = tables(read_runs([tmp_path]))
    whole, deep, greedy = (next(r for r in four.rows if r.method == m) for m in ("e2e", "auglocal", "greedy_ce"))
    assert four.relative_flops(whole) == 1 and four.at_equal_flops(whole) is None
    for row, least, most in ((greedy, 1.05, 1.1), (deep, 1.4, 1.6)):
        ratio = four.relative_flops(row)
        assert ratio is not None and least < ratio < most
        assert four.at_equal_flops(row) == pytest.approx(100 * (0.65 - 0.60 - 0.10 * (4 * ratio - 4) / 4))
    assert eight.at_equal_flops(next(row for row in eight.rows if row.method == "greedy_ce")) is None


def test_a_network_that_cannot_be_built_has_no_flops(tmp_path: Path) -> None:
    written_run(tmp_path / "a", ["dataset=cifar10", "backbone.name=gone"], CURVE, test_accuracy=0.9, classes=TEN)
    (found,) = tables(read_runs([tmp_path]))
    assert found.rows[0].flops is None and found.relative_flops(found.rows[0]) is None


def test_recomputation_counts_as_work(tmp_path: Path) -> None:
    """Also of an end-to-end row: the reference is the one with the least work."""
    for name, own in (("plain", []), ("again", ["efficiency=checkpoint"])):
        more = ["dataset=cifar10", "method=e2e", *own]
        written_run(tmp_path / name, more, CURVE, test_accuracy=0.6, classes=TEN)
    (found,) = tables(read_runs([tmp_path]))
    again, plain = sorted((found.relative_flops(row) or 0 for row in found.rows), reverse=True)
    assert plain == 1 and 1.2 < again < 1.4


def test_nothing_is_interpolated_where_training_was_cut_short(tmp_path: Path) -> None:
    for name, own in (
        ("short", ["method=e2e", "epochs=2"]),
        ("long", ["method=e2e", "epochs=50", "callbacks.early_stopping=1"]),
        ("local", ["method=greedy_ce", "epochs=2"]),
    ):
        figures: dict[str, Any] = {"classes": TEN, "test_accuracy": 0.6}
        written_run(tmp_path / name, ["dataset=cifar10", *own], CURVE, **figures)
    found = tables(read_runs([tmp_path]))
    assert all(table.at_equal_flops(row) is None for table in found for row in table.rows)

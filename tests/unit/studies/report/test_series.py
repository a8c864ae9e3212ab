"""What the plots show, from the runs' files; where numbers go in them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import pytest
from matplotlib.figure import Figure

from localfeat.studies.report.labels import spread
from localfeat.studies.report.plots import DARK, LIGHT, colour, plots
from localfeat.studies.report.rows import Table, tables
from localfeat.studies.report.runs import read_runs
from localfeat.studies.report.series import depth_curves, learning_curves, loss_weights, memory_points, pareto_front
from tests.helpers.written import GIB, written_run

CURVES = {0: [0.5, 0.6, 0.7], 1: [0.52, 0.58, 0.66]}
ROWS = {  # accuracy, GiB
    ("method=e2e", "split=k4"): (0.80, 10.0),
    ("method=feature_recon", "split=k4"): (0.78, 5.0),
    ("method=feature_recon", "split=k2"): (0.77, 7.0),
    ("method=greedy_ce", "split=k4"): (0.70, 4.0),
    ("method=image_recon", "split=k4"): (0.78, 6.0),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("runs")
    for (method, split), (accuracy, size) in ROWS.items():
        for seed, curve in CURVES.items():
            place = folder / f"{method},{split},{seed}"
            own = ["dataset=cifar10", "epochs=3", method, split, f"seed={seed}"]
            bytes_ = int(size * GIB)
            written_run(place, own, curve, test_accuracy=accuracy + seed / 100, peak_memory_bytes=bytes_)
            if method != "method=image_recon":
                write_inspection(place, seed)
    (found,) = tables(read_runs([folder]))
    return found


def write_inspection(run: Path, seed: int) -> None:
    blocks = [{"block": "embedding", "ends_module": False, "linear_probe": 0.2 + seed / 10, "knn": 0.1}]
    blocks += [{"block": i, "ends_module": i == 1, "linear_probe": 0.3 + i / 10, "knn": 0.2} for i in range(2)]
    (run / "inspection").mkdir()
    (run / "inspection" / "inspection.json").write_text(json.dumps({"blocks": blocks}))


def test_points_and_the_pareto_front(table: Table) -> None:
    points = {(f"method={p.row.method}", f"split=k{max(p.row.modules, 1)}"): p for p in memory_points(table)}
    for (method, split), (accuracy, size) in ROWS.items():
        point = points[method, "split=k1" if method == "method=e2e" else split]
        assert point.accuracy == pytest.approx(100 * accuracy + 0.5) and point.memory == pytest.approx(size)
        assert point.std == pytest.approx(100 * stdev([accuracy, accuracy + 0.01]))
    front = [(point.row.method, point.row.modules) for point in pareto_front(list(points.values()))]
    assert front == [("greedy_ce", 4), ("feature_recon", 4), ("e2e", 1)]


def test_learning_curves_are_means_over_seeds(table: Table) -> None:
    curve = learning_curves(table)[0]
    assert curve.x == (1, 2, 3)
    assert curve.mean == pytest.approx([100 * mean(values) for values in zip(*CURVES.values(), strict=True)])
    assert curve.std == pytest.approx([100 * stdev(values) for values in zip(*CURVES.values(), strict=True)])


def test_depth_is_drawn_for_inspected_rows_alone(table: Table) -> None:
    curves = depth_curves(table, "linear_probe")
    assert {curve.row.method for curve in curves} == {"e2e", "feature_recon", "greedy_ce"}
    assert curves[0].x == (0, 1, 2) and curves[0].mean == pytest.approx([25, 30, 40]) and curves[0].marked == (2,)
    assert depth_curves(table, "knn")[0].mean == pytest.approx([10, 20, 20])


def test_weights_are_those_of_the_method(table: Table) -> None:
    found = {(w.rows[0].method, w.rows[0].modules): w for w in loss_weights(table)}
    assert found["greedy_ce", 4].reconstruction is None and found["greedy_ce", 4].supervision == (1, 1, 1)
    assert found["image_recon", 4].reconstruction == (3, 2, 1) and found["image_recon", 4].supervision == (1, 2, 3)
    assert {row.method for row in found["image_recon", 4].rows} == {"image_recon", "feature_recon"}
    assert found["feature_recon", 2].reconstruction == (3,) and ("e2e", 1) not in found


def test_rows_have_colours_of_their_own_in_both_themes(table: Table) -> None:
    for theme in (LIGHT, DARK):
        assert len({colour(row, table, theme) for row in table.rows}) == len(table.rows)


def test_figures_show_every_row(table: Table) -> None:
    kinds = {}
    for picture, draw in plots(table):
        figure = draw(LIGHT)
        assert isinstance(figure, Figure)
        kinds[picture.stem.split("_")[1]] = len(figure.legends[0].get_texts())
    assert kinds == {"memory": 5, "curves": 5, "depth": 4, "weights": 3}


def test_numbers_at_the_ends_of_curves_are_moved_apart_and_stay_in_order() -> None:
    axis = Figure().subplots()
    axis.set_ylim(0, 100)
    placed = spread(axis, [50.0, 50.5, 49.9, 90.0], gap=0.04)
    assert placed[3] == 90 and placed[2] < placed[0] < placed[1]
    ordered = sorted(placed)
    assert min(b - a for a, b in pairwise(ordered)) >= 4 - 1e-9
    assert mean(placed[:3]) == pytest.approx(mean([50, 50.5, 49.9]))


def test_numbers_at_the_ends_of_many_curves_stay_within_the_axis() -> None:
    axis = Figure().subplots()
    axis.set_ylim(10, 20)
    placed = spread(axis, [19.9] * 20 + [10.0] * 10, gap=0.06)
    assert min(placed) >= 10 and max(placed) <= 20 + 1e-9
    assert min(b - a for a, b in pairwise(sorted(placed))) == pytest.approx(10 / 29)


@pytest.mark.slow
def test_no_name_in_a_legend_is_cut_off(tmp_path: Path) -> None:
    """However long a label is, it stands within the figure, whole."""
    settings = [f"method.width={64 + i}" for i in range(10)] + ["method.supervision_weight=[0.125,0.25]"]
    longest = ["batch_size=4096", "optimizer.lr=0.000123", f"optimizer.name={'very_long_name' * 8}", "decoder=deconv"]
    for index, setting in enumerate(settings):
        more = [setting, *(longest if index % 2 else [])]
        own = ["dataset=cifar10", "epochs=3", "method=feature_recon", "seed=0", *more]
        written_run(tmp_path / str(index), own, CURVES[0], test_accuracy=0.5 + index / 100)
    (table,) = tables(read_runs([tmp_path]))
    for picture, draw in plots(table):
        figure = draw(LIGHT)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        for text in legend.get_texts():
            edge = text.get_window_extent()
            assert edge.x0 >= 0 and edge.x1 <= figure.bbox.x1 and edge.y0 >= 0, (picture.stem, text.get_text())
        assert legend.get_window_extent().y1 < figure.axes[0].get_window_extent().y0
        if picture.stem != "1_weights":
            names = ["".join(text.get_text().split()) for text in legend.get_texts()]
            labels = [row.label.replace("supervision_weight=[1,3]", "") for row in table.rows]  # ten of eleven have it
            assert names == [f"{i}{label}".replace(" ", "") for i, label in enumerate(labels, start=1)]


def test_a_legend_leaves_out_what_nearly_all_rows_have(tmp_path: Path) -> None:
    for index, batch in enumerate([128, 128, 128, 128, 512]):
        own = ["dataset=cifar10", "epochs=3", f"method.width={64 + index}", "seed=0", f"batch_size={batch}"]
        written_run(tmp_path / str(index), own, CURVES[0], test_accuracy=0.5)
    (table,) = tables(read_runs([tmp_path]))
    figure = next(draw for picture, draw in plots(table) if picture.stem == "1_memory")(LIGHT)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert ["batch_size" in name for name in names] == [False, False, False, False, True]
    assert [f"width={64 + index}" in name for index, name in enumerate(names)] == [True] * 5

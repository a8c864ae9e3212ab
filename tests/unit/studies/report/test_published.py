"""Published figures are the paper's, and stand beside those rows alone that they were measured for."""

from __future__ import annotations

from pathlib import Path

import pytest

from localfeat.studies.report.published import match_keys, published, published_for
from localfeat.studies.report.runs import read_runs
from localfeat.studies.report.settings import settings
from tests.helpers.written import written_run

TABLE_4 = {  # accuracies from scratch, Swin-T, K=4, as in TRGL's table; then memory saved
    "e2e": ((91.37, 75.03, 72.19), (None, None, None)),
    "image_recon": ((83.38, 68.36, 64.61), (38, 38, 38)),
    "feature_recon": ((86.28, 73.00, 66.89), (45, 45, 45)),
    "greedy_ce": ((83.94, 69.34, 67.00), (33, 33, 55)),
}
DATASETS = ("cifar10", "cifar100", "stl10")


def found_for(folder: Path, *overrides: str, accuracy: float | None = 0.9):
    written_run(folder, overrides, [0.5], test_accuracy=accuracy)
    (run,) = read_runs([folder])
    return published_for(settings(run))


@pytest.mark.parametrize("method", TABLE_4)
def test_every_figure_of_the_table_reaches_its_row(tmp_path: Path, method: str) -> None:
    for index, dataset in enumerate(DATASETS):
        found = found_for(tmp_path / dataset, f"dataset={dataset}", f"method={method}", "split=k4")
        accuracies, memory = TABLE_4[method]
        assert (found.accuracy, found.memory_saved) == (accuracies[index], memory[index])
        assert found.memory_mb == (14769 if (method, dataset) == ("e2e", "cifar100") else None)
        assert any("TRGL (NeurIPS 2023), Table 4" in line for line in found.sources)


@pytest.mark.parametrize(
    "change",
    [
        "split=k2",
        "image_size=160",
        "backbone=swin_small",
        "backbone.pretrained=true",
        "dataset=svhn",
        "method.supervision=cross_entropy",
        "method.reconstruction_loss=mse",
        "trainer.limit_train_batches=10",
        "trainer.max_steps=10",
        "+backbone.arguments.embed_dim=48",
        "test=false",
    ],
)
def test_no_accuracy_where_one_setting_is_another(tmp_path: Path, change: str) -> None:
    own = ["dataset=cifar10", "method=feature_recon", "split=k4", change]
    assert found_for(tmp_path / "run", *own, accuracy=None if change == "test=false" else 0.9).accuracy is None


def test_memory_saved_is_the_papers_for_two_modules_too(tmp_path: Path) -> None:
    found = found_for(tmp_path / "run", "dataset=svhn", "backbone.pretrained=true", "split=k2")
    assert (found.accuracy, found.memory_saved) == (None, 36)


def test_every_match_key_is_one_of_a_runs_settings(tmp_path: Path) -> None:
    """A key that no run has would match nothing, ever."""
    known: set[str] = set()
    for method in ("e2e", "greedy_ce", "image_recon", "feature_recon"):
        written_run(tmp_path / method, ["dataset=cifar10", f"method={method}"], [0.5], test_accuracy=0.5)
    for run in read_runs([tmp_path]):
        known |= set(settings(run))
    content = published()
    entries = [*content["figures"], *content["claims"]]
    assert {key for entry in entries for key in match_keys(entry["match"])} <= known
    assert {entry["source"] for entry in entries} == set(content["sources"])
    assert len(content["figures"]) == 18 and sum("accuracy" in figure for figure in content["figures"]) == 15

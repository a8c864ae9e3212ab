"""``localfeat probe`` on runs of the digits: figures, files, refusals, and W&B."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from localfeat.data.datamodule import ImageDataModule
from localfeat.data.sources import Digits
from localfeat.run.command import run
from localfeat.run.evaluate import evaluate
from localfeat.run.export import build_backbone
from localfeat.run.folder import RunFolder
from localfeat.studies.probe import inspecting
from localfeat.studies.probe.command import _table
from localfeat.studies.probe.features import sample
from localfeat.studies.probe.figures import accuracy_by_depth, cka_heat_map, draw_accuracies
from localfeat.studies.probe.inspecting import Request, inspect_run
from localfeat.studies.probe.upload import COLUMNS, LOGGER, _settings, upload
from tests.helpers import reference
from tests.helpers.command_line import call
from tests.helpers.wandb_account import without_login
from tests.helpers.whole_runs import SMALL, TINY_SWIN, composed, draw_nothing, files_below, small_run
from tests.unit.run.test_wandb_logger import read_run, records

PICTURES = {"accuracy_by_depth.png", "cka.png", "reconstructions.png"}
SIZES = ["images=100", "train_images=300"]
CONVNEXT = [
    "backbone=swin_tiny",
    "backbone.name=convnext_atto",
    "backbone.drop_path_rate=0.0",
    "+backbone.arguments={depths:[1,1,2,1],dims:[8,16,32,64]}",
    "image_size=32",
    "trainer.precision=bf16-mixed",
    "epochs=1",
]
LONGER = [
    "epochs=5",
    "batch_size=64",
    "optimizer.lr=0.02",
    "dataset.augmentation=none",
    "trainer.limit_train_batches=20",
    "trainer.limit_val_batches=null",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run to inspect and an end-to-end run of the same seed, trained longer."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        small_run(folder / "local", "method=feature_recon", "split=cuts", "split.cuts=[1,2]")
        small_run(folder / "e2e", "method=e2e", *LONGER)
    return folder


@pytest.fixture(scope="module")
def inspected(runs: Path) -> dict[str, Any]:
    return inspect_run(Request(runs / "local", runs / "e2e", images=100, train_images=300))


def independent(run: Path, count: int = 100, train_count: int = 300) -> dict[str, Any]:
    """Return figures of the exported backbone's own blocks, computed by ``tests.helpers.reference``."""
    model, datamodule = build_backbone(run / "backbone.safetensors"), ImageDataModule("digits", image_size=16)
    means, labels, predictions = {}, {}, {}
    for split, images in (("train", train_count), ("val", count)):
        raw, truth = (torch.cat(parts) for parts in zip(*sample(datamodule, split, images), strict=True))
        pixels, _ = datamodule.prepare(raw, truth, training=False)
        means[split], predictions[split] = reference.hooked_means("swin", model, pixels)
        labels[split] = truth.numpy()
    found: dict[str, Any] = {"means": means["val"], "linear_probe": [], "knn": []}
    for before, after in zip(means["train"], means["val"], strict=True):
        train, held_out = reference.standardised(before, after)
        data = (train, labels["train"], held_out, labels["val"])
        found["linear_probe"].append(reference.probe_accuracy(*data, 10, reference.left_out_error_by_hat))
        found["knn"].append(reference.knn_accuracy(*data, 20))
    found["classifier"] = (predictions["val"] == labels["val"]).mean()
    return found


def test_every_figure_is_that_of_the_exported_backbone(runs: Path, inspected: dict[str, Any]) -> None:
    own, other = independent(runs / "local"), independent(runs / "e2e")
    for found, expected in ((inspected, own), (inspected["reference"], other)):
        assert found["classifier_accuracy"] == pytest.approx(expected["classifier"])
        for key in ("linear_probe", "knn"):
            figures = [block[key] for block in found["blocks"]]
            assert figures[1:] == pytest.approx(expected[key]), key
            assert [m[key] for m in found["modules"]] == [b[key] for b in found["blocks"] if b["ends_module"]]
    matrix = [[reference.cka(x, y) for y in other["means"]] for x in own["means"]]
    np.testing.assert_allclose(inspected["cka"]["matrix"], matrix, rtol=1e-4)
    assert inspected["cka"]["with"] == inspected["reference"]["run"] == str(runs / "e2e")


def test_json_holds_what_was_asked_for(runs: Path, inspected: dict[str, Any]) -> None:
    folder = runs / "local" / "inspection"
    assert files_below(folder) == {"inspection.json", *PICTURES}
    assert json.loads((folder / "inspection.json").read_text()) == inspected
    asked = {key: inspected[key] for key in ("run", "split", "images", "train_images", "checkpoint", "neighbours")}
    assert asked == {
        "run": str(runs / "local"),
        "split": "val",
        "images": 100,
        "train_images": 300,
        "checkpoint": "best",
        "neighbours": 20,
    }
    places = [
        tuple(block[key] for key in ("block", "module", "channels", "ends_module")) for block in inspected["blocks"]
    ]
    assert places == [
        ("embedding", 1, 8, False),
        (0, 1, 8, True),
        (1, 2, 16, True),
        (2, 3, 32, False),
        (3, 3, 64, True),
    ]
    assert [module["module"] for module in inspected["modules"]] == [1, 2, 3]
    assert inspected["cka"]["own_blocks"] == inspected["cka"]["other_blocks"] == [0, 1, 2, 3]


def test_the_table_prints_the_figures(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without a second run, blocks are compared with those of the same network; e2e has no reconstructions."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "reconstructions.png").write_text("of an earlier inspection")
    assert call(monkeypatch, "probe", f"run={runs}/e2e", *SIZES, f"output={tmp_path}/out") == 0
    found = json.loads((tmp_path / "out" / "inspection.json").read_text())
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["block", "module", "channels", "linear", "probe", "kNN"]
    for line, block in zip(lines, found["blocks"], strict=False):
        name = "embedding" if block["block"] == "embedding" else str(block["block"] + 1)
        end = ["|"] if block["ends_module"] else []
        figures = [f"{block['linear_probe']:.2%}", f"{block['knn']:.2%}"]
        assert line.split() == [name, "1", *end, str(block["channels"]), *figures]
    assert lines[5] == f"classifier {found['classifier_accuracy']:.2%} on 100 val images"
    assert lines[6:] == [f"folder     {tmp_path}/out"]
    assert files_below(tmp_path / "out") == {"inspection.json", *PICTURES - {"reconstructions.png"}}
    matrix = np.array(found["cka"]["matrix"])
    assert found["cka"]["with"] is found["reference"] is None
    np.testing.assert_allclose(np.diag(matrix), 1)
    np.testing.assert_allclose(matrix, matrix.T)
    assert (matrix + 2 * np.eye(4)).min() < 0.99


def test_the_table_has_the_other_network_beside_it(
    runs: Path, inspected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("localfeat.studies.probe.inspecting.inspect_run", lambda request: inspected)
    assert call(monkeypatch, "probe", f"run={runs}/local", f"e2e={runs}/e2e") == 0
    heading, first, *lines = capsys.readouterr().out.splitlines()
    assert (
        heading.endswith("e2e probe    CKA")
        and first.split()[-1] == f"{inspected['reference']['blocks'][0]['linear_probe']:.2%}"
    )
    for number, line in enumerate(lines[:4]):
        probe, similarity = inspected["reference"]["blocks"][number + 1]["linear_probe"], inspected["cka"]["matrix"]
        assert line.split()[-2:] == [f"{probe:.2%}", f"{similarity[number][number]:.3f}"]


def test_the_last_probe_comes_near_the_classifier_of_a_trained_run(runs: Path, tmp_path: Path) -> None:
    found = inspect_run(Request(runs / "e2e", output=tmp_path))
    assert found["images"] == 144 and found["train_images"] == 1294, "all there are"
    accuracies = [block["linear_probe"] for block in found["blocks"]]
    assert found["classifier_accuracy"] == pytest.approx(evaluate(runs / "e2e", "val")["accuracy"])
    assert found["classifier_accuracy"] > 0.9
    assert accuracies[-1] == pytest.approx(found["classifier_accuracy"], abs=0.04)
    assert accuracies[0] < accuracies[-1] - 0.3


def test_test_images_are_read_only_when_asked_for(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    load = Digits.load
    monkeypatch.setattr(Digits, "load", lambda self, split: seen.append(split) or load(self, split))
    request = Request(runs / "e2e", images=400, train_images=50, output=tmp_path)
    inspect_run(request)
    assert "train" in seen and "test" not in seen
    found = inspect_run(replace(request, split="test"))
    assert "test" in seen
    assert found["images"] == 359 and found["split"] == "test"
    assert found["classifier_accuracy"] == pytest.approx(evaluate(runs / "e2e", "test")["accuracy"])


@pytest.mark.slow
def test_another_backbone_in_bf16_beside_it(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix has a row per own block and a column per other block; each network gets images of its own size."""
    draw_nothing(monkeypatch)
    small = [override for override in SMALL if override not in TINY_SWIN]
    run(composed(*small, "method=e2e", *CONVNEXT), tmp_path / "convnext")
    found = inspect_run(
        Request(runs / "local", tmp_path / "convnext", images=60, train_images=60, output=tmp_path / "out")
    )
    assert np.array(found["cka"]["matrix"]).shape == (4, 5)
    assert [block["channels"] for block in found["reference"]["blocks"]] == [8, 8, 16, 32, 32, 64]
    assert files_below(tmp_path / "out") == {"inspection.json", *PICTURES}
    columns = [column.header for column in _table(found).columns]
    assert columns == ["block", "module", "channels", "linear probe", "kNN"], "blocks of other depths are not paired"
    axis = Figure().subplots()
    draw_accuracies(axis, found["reference"], 4, "red", "e2e, ", 20)
    assert [str(line.get_label()) for line in axis.get_lines()] == [
        "e2e, linear probe (5 blocks)",
        "e2e, 20 neighbours (5 blocks)",
    ]
    assert list(axis.get_lines()[0].get_xdata()) == pytest.approx([0, 0.8, 1.6, 2.4, 3.2, 4])


def test_pictures_show_the_figures(inspected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    accuracy_by_depth(inspected, tmp_path / "a.png")
    cka_heat_map(inspected, tmp_path / "b.png")
    lines = {str(line.get_label()): list(line.get_ydata()) for line in drawn[0].axes[0].get_lines()}
    for found in (inspected, inspected["reference"]):
        for key, name in (("linear_probe", "linear probe"), ("knn", "20 neighbours")):
            expected = [100 * block[key] for block in found["blocks"]]
            assert lines.pop(f"{found['method']}, {name}") == pytest.approx(expected)
    assert lines.pop("feature_recon, classifier")[0] == pytest.approx(100 * inspected["classifier_accuracy"])
    assert not lines
    heat = drawn[1].axes[0]
    np.testing.assert_allclose(heat.get_images()[0].get_array(), inspected["cka"]["matrix"])
    written = [text.get_text() for text in heat.texts]
    assert written == [f"{value:.2f}" for row in inspected["cka"]["matrix"] for value in row]
    assert [line.get_ydata()[0] for line in heat.get_lines()] == [0.5, 1.5], "cuts of the inspected run, e2e has none"


def test_reconstructions_of_images_from_all_over_the_sample(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first images would be of one class, because image folders are sorted by class."""
    drawn: list[tuple[Any, torch.Tensor]] = []
    monkeypatch.setattr(inspecting, "reconstruction_grid", lambda found, images, file: drawn.append((found, images)))
    inspect_run(Request(runs / "local", images=71, train_images=40, output=tmp_path))
    ((found, images),) = drawn
    datamodule = ImageDataModule("digits", image_size=16)
    raw = torch.cat([images for images, _ in sample(datamodule, "val", 71)])
    assert torch.equal(images, raw[::10] / 255)
    assert [entry.module for entry in found] == [1, 2]


def changed(run: Path, folder: Path, **dataset: Any) -> Path:
    """Copy a run and change values of its dataset configuration."""
    shutil.copytree(run, folder)
    config = OmegaConf.load(folder / "config.yaml")
    config.dataset.update(dataset)
    config.seed = config.dataset.seed
    OmegaConf.save(config, folder / "config.yaml")
    return folder


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "run has to be given"),
        (["run=nowhere"], "nowhere is not the folder of a run"),
        (["run={runs}/local", "e2e=nowhere"], "nowhere is not the folder of a run"),
        (["run={runs}/local", "split=train"], "split=train: it is val or test"),
        (["run={runs}/local", "images=some"], "images=some: it is a number of images, at least 2"),
        (["run={runs}/local", "train_images=1"], "train_images=1: it must be at least 2"),
        (["run={runs}/local", "checkpoint=first"], "checkpoint=first: it is best or last"),
        (["run={runs}/local", "wandb=yes"], "wandb=yes: it is true or false"),
        (["run={runs}/local", "output={runs}/local/config.yaml"], "config.yaml: it cannot be written to (File exists)"),
        (["run={runs}/local", "output="], "output= is empty"),
        (["run={runs}/local", "output=taken"], "output=taken: it cannot be written to (Is a directory)"),
        (["run={runs}/local", "e2e=other_seed"], "with dataset.seed=1 (run: 0) it was trained on validation images"),
        (["run={runs}/local", "e2e=other_data"], "e2e=other_data: its dataset is svhn, but run has digits"),
        (["run=no_validation"], "there is no validation split: val_fraction=0"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    line: str,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "inspection.json").mkdir(parents=True)
    changed(runs / "e2e", tmp_path / "other_seed", seed=1)
    changed(runs / "e2e", tmp_path / "other_data", source="svhn")
    changed(runs / "e2e", tmp_path / "no_validation", val_fraction=0.0)
    assert call(monkeypatch, "probe", *(a.format(runs=runs) for a in arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert line in printed.err


def test_wandb_gets_a_run_of_its_own(
    runs: Path, inspected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the project and group of the run's own logger, and is offline without a login."""
    without_login(tmp_path / "home", monkeypatch)
    shutil.copytree(runs / "local" / "inspection", tmp_path / "out")
    config = RunFolder(runs / "local").read_config()
    logger = {"_target_": LOGGER, "project": "study", "group": "g", "name": "mine", "tags": ["a"], "job_type": "train"}
    upload(inspected, {**config, "logger": logger}, tmp_path / "out")
    (folder,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    sent = read_run(folder)
    assert (sent["project"], sent["group"], sent["name"], sent["job_type"]) == ("study", "g", "mine-inspect", "inspect")
    assert json.loads(sent["config"]["method"]) == config["method"]
    assert json.loads(sent["config"]["inspection"])["images"] == 100
    (file,) = folder.glob("files/media/table/**/*.json")
    table = json.loads(file.read_text())
    assert table["columns"] == COLUMNS
    expected = [
        [str(value) if key == "block" else value for key, value in block.items()] for block in inspected["blocks"]
    ]
    assert table["data"] == expected
    pictures = {path.name.rsplit("_", 2)[0] for path in folder.glob("files/media/images/**/*.png")}
    assert {f"{name}.png" for name in pictures} == PICTURES
    summary: dict[str, Any] = {}
    for record in records(folder):
        for item in record.summary.update:
            summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    assert summary["inspection/classifier_accuracy"] == inspected["classifier_accuracy"]
    for module in inspected["modules"]:
        assert summary[f"inspection/module_{module['module']}/linear_probe"] == module["linear_probe"]
        assert summary[f"inspection/module_{module['module']}/knn"] == module["knn"]


def test_wandb_of_a_run_without_it(inspected: dict[str, Any], runs: Path) -> None:
    settings = _settings(inspected, RunFolder(runs / "local").read_config())
    assert settings == {"project": "localfeat", "name": "digits-feature_recon-seed0-inspect", "job_type": "inspect"}

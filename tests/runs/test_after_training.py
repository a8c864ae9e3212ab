"""``localfeat.run.evaluate`` and ``localfeat.run.predict`` on a run of the digits."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from localfeat.data.datamodule import ImageDataModule
from localfeat.run.evaluate import evaluate
from localfeat.run.export import build_backbone
from tests.helpers.command_line import call


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        short = ["epochs=2", "trainer.limit_train_batches=6", "callbacks=ema", "callbacks.ema=0.5"]
        assert call(patch, "run", *short, "hydra.run.dir=run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the first test digits as PNG files, two of them in a subfolder."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "more").mkdir()
    images, _ = next(iter(ImageDataModule("digits", batch_size=8).ordered_loader("test")))
    for i, image in enumerate(images):
        path = folder / ("more" if i > 5 else ".") / f"{i}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


def probabilities_by_hand(run: Path) -> torch.Tensor:
    """Return probabilities of the first eight test digits by the exported weights in a plain timm model."""
    model = build_backbone(run / "backbone.safetensors").eval()
    datamodule = ImageDataModule("digits", batch_size=8, image_size=16)
    images, labels = next(iter(datamodule.ordered_loader("test")))
    with torch.no_grad():
        return model(datamodule.prepare(images, labels, training=False)[0]).softmax(1)


def test_evaluate_repeats_the_runs_own_figures(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    summary = json.loads((run / "summary.json").read_text())
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "evaluate", f"run={run}", "json=figures.json") == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["accuracy"] == pytest.approx(summary["test_accuracy"], abs=1e-6)
    assert figures["images"] == 359
    printed = capsys.readouterr().out
    assert printed == f"test: accuracy {figures['accuracy']:.2%}, loss {figures['loss']:.4f}, 359 images\n"
    assert evaluate(run, "val")["accuracy"] == pytest.approx(summary["val_accuracy"], abs=1e-6)


def test_the_summary_says_what_was_typed(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["overrides"] == ["epochs=2", "trainer.limit_train_batches=6", "callbacks=ema", "callbacks.ema=0.5"]


def test_without_its_best_checkpoint_a_run_asks_for_the_last(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    best, advice = tmp_path / "run/checkpoints/best.ckpt", "checkpoint=last takes the weights of the last epoch\n"
    for damage in (lambda: best.write_text("half a file"), best.unlink):
        damage()
        assert call(monkeypatch, "evaluate", f"run={tmp_path}/run") == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith(advice)
    assert call(monkeypatch, "evaluate", f"run={tmp_path}/run", "checkpoint=last") == 0


def test_evaluate_reads_the_checkpoint_it_is_told_to(run: Path) -> None:
    assert {evaluate(run, "train", name)["images"] for name in ("best", "last")} == {1294}
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 12
    changed = run.parent / "changed"
    (changed / "checkpoints").mkdir(parents=True)
    (changed / "config.yaml").write_text((run / "config.yaml").read_text())
    saved["state_dict"] = {name: torch.zeros_like(value) for name, value in saved["state_dict"].items()}
    torch.save(saved, changed / "checkpoints" / "last.ckpt")
    found = evaluate(changed, "test", "last")
    assert found["loss"] == pytest.approx(2.302585, abs=1e-5)  # zero weights: log(10)


def test_images_that_have_moved_are_asked_for(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = (run / "config.yaml").read_text().replace("source: digits", "source: image_folder\n  root: gone")
    (tmp_path / "run/config.yaml").write_text(config.replace("  root: data\n", ""))
    for typed, line in (([], "in gone: there is no such"), (["root={run}/config.yaml"], "is a file, not a folder")):
        assert call(monkeypatch, "evaluate", f"run={tmp_path}/run", *(a.format(run=run) for a in typed)) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: the run's images were in ") and err.endswith("give root=<folder>\n")
        assert line in err


@pytest.mark.parametrize("size", [3, 10**30])
def test_predict_writes_the_models_probabilities(
    size: int, run: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "predict", f"run={run}", f"images={digits}", f"batch_size={size}") == 0
    with (tmp_path / "predictions.csv").open() as handle:
        header, *rows = csv.reader(handle)
    assert header == ["file", "prediction", *(f"probability_{digit}" for digit in range(10))]
    assert [Path(row[0]).name for row in rows] == [f"{i}.png" for i in range(8)]
    found = torch.tensor([[float(value) for value in row[2:]] for row in rows])
    expected = probabilities_by_hand(run)
    assert torch.allclose(found, expected, atol=0.02)  # Pillow enlarges the files, our resize the batches
    assert torch.allclose(found.sum(1), torch.ones(8), atol=1e-5)
    assert [row[1] for row in rows] == [str(int(row.argmax())) for row in found]


@pytest.mark.parametrize(
    ("module", "arguments", "line"),
    [
        ("evaluate", [], "run has to be given"),
        ("evaluate", ["run=nowhere"], "nowhere is not the folder of a run: there is no such folder"),
        ("evaluate", ["run={run}", "method=e2e"], "method: there is no such key (see --help)"),
        ("predict", ["run={run}", "images={run}/config.yaml"], "config.yaml: it is a file, not a folder"),
        ("evaluate", ["run={run}", "split=all"], "split=all: it is train, val or test"),
        ("evaluate", ["run={run}", "checkpoint=first"], "checkpoint=first: it is best or last"),
        ("evaluate", ["run={run}", "spilt=val"], "spilt: there is no such key; did you mean split?"),
        ("evaluate", ["{run}"], "arguments are key=value"),
        ("predict", ["run={run}"], "images has to be given"),
        ("predict", ["run={run}", "images=nowhere"], "images=nowhere: there is no such folder"),
        ("predict", ["run={run}", "images={run}/checkpoints"], "no image in"),
        ("predict", ["run={run}", "images={run}", "batch_size=many"], "batch_size=many"),
        (
            "predict",
            ["run={run}", "images={run}", "batch_size=²"],
            "batch_size=²: it is a number of images, at least 1",
        ),
        ("predict", ["run={run}", "images={run}", "batch_size=0"], "batch_size=0: it must be at least 1"),
        ("predict", ["run={run}", "images={run}", f"batch_size={'9' * 5000}"], "it is a number of images, at least 1"),
        ("predict", ["run={run}", "images={run}", "output=no/such/file.csv"], "there is no folder no/such"),
        ("predict", ["run={run}", "images={run}", "output={run}"], "not a regular file; give the path of a file"),
        ("predict", ["run={run}", "images="], "images= is empty: give a value"),
        ("evaluate", ["run={run}", "json=no/such/file.json"], "there is no folder no/such"),
        ("evaluate", ["run={run}", "json=/dev/null"], "json=/dev/null: not a regular file; give the path of a file"),
        ("evaluate", ["run={run}", "root="], "root= is empty: give a value"),
        ("evaluate", ["run={run}/summary.json"], "summary.json is not the folder of a run"),
    ],
)
def test_mistakes_are_one_line(
    module: str,
    arguments: list[str],
    line: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, module, *(a.format(run=run) for a in arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert line in printed.err


def test_one_bad_image_loses_no_prediction(
    run: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A file name need not be valid text either."""
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "images"
    shutil.copytree(digits, images)
    os.rename(images / "0.png", os.fsencode(images) + b"/\xff.png")
    arguments = [f"run={run}", "images=images", "batch_size=1"]
    assert call(monkeypatch, "predict", *arguments) == 0
    before = (tmp_path / "predictions.csv").read_bytes()
    assert before.count(b"\n") == 9 and b"images/\xff.png," in before
    (images / "more" / "7.png").write_bytes(b"no image")
    capsys.readouterr()
    assert call(monkeypatch, "predict", *arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == "7 images -> predictions.csv\n"
    bad, line = printed.err.splitlines()
    assert bad.startswith("warning: left out: cannot read the image images/more/7.png: ")
    assert line == "error: 1 of 8 images cannot be read and are not in predictions.csv"
    after = (tmp_path / "predictions.csv").read_bytes()
    assert set(after.splitlines()) == {row for row in before.splitlines() if b"7.png" not in row}
    for file in images.rglob("*.png"):
        file.write_bytes(b"no image")
    assert call(monkeypatch, "predict", *arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: none of the 8 images of images can be read"
    assert (tmp_path / "predictions.csv").read_bytes() == after
    assert {path.name for path in tmp_path.iterdir()} == {"images", "predictions.csv"}


@pytest.mark.parametrize("module", ["evaluate", "predict"])
def test_an_output_that_cannot_be_written_is_one_line(
    module: str,
    run: Path,
    digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    output = {"evaluate": ["json=figures.json"], "predict": [f"images={digits}", "output=figures.json"]}
    assert call(monkeypatch, module, f"run={run}", *output[module]) == 1
    err = capsys.readouterr().err
    assert err == "error: figures.json cannot be written (No space left on device)\n"
    assert list(tmp_path.iterdir()) == []


def test_an_ended_run_is_not_resumed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "summary.json").read_bytes()
    assert call(monkeypatch, "run", f"resume={run}") == 2
    assert "has ended" in capsys.readouterr().err
    assert (run / "summary.json").read_bytes() == before

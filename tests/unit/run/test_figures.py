"""Figures: the content is right, equal features get equal colours, no global state is left."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from localfeat.run import figures
from localfeat.run.figures import as_pixels, learning_curves, module_terms, reconstruction_grid, running_mean
from localfeat.run.loggers.metrics_csv import MetricsCsv, read_series
from localfeat.utils.errors import RunFailed, UserError
from tests.helpers.small_disk import fill, small_disk


@dataclass
class Reconstruction:
    module: int
    kind: str
    target: Tensor
    output: Tensor


def write_metrics(folder: Path, batches: int = 200, modules: int = 4) -> Path:
    """Write a synthetic run: falling, noisy curves with validation every 40 batches."""
    logger = MetricsCsv(folder)
    noise = torch.randn(batches, modules, generator=torch.Generator().manual_seed(0))
    for step in range(batches):
        fall = math.exp(-step / 80)
        row = {"epoch": step // 40, "train/loss": 0.2 + 2 * fall + 0.1 * float(noise[step, -1])}
        row["train/accuracy"] = 0.9 - 0.8 * fall + 0.02 * float(noise[step, 0])
        for module in range(1, modules):
            row[f"train/module_{module}/reconstruction"] = 0.5 + 0.1 * module + 0.2 * fall
            row[f"train/module_{module}/contrast"] = 3 + fall - 0.3 * module + 0.1 * float(noise[step, module])
            row[f"train/module_{module}/loss"] = 4.5 + fall - 0.2 * module + 0.1 * float(noise[step, module])
        row[f"train/module_{modules}/loss"] = row[f"train/module_{modules}/cross_entropy"] = row["train/loss"]
        logger.log_metrics(row, step)
        if step % 40 == 39:
            logger.log_metrics({"val/loss": 0.3 + 2 * fall, "val/accuracy": 0.9 - 0.8 * fall}, step)
    return logger.path


def sample(kind: str, channels: int = 24, size: int = 8, count: int = 8) -> tuple[Tensor, Reconstruction]:
    """Return images of coloured stripes, and a target made from them with a similar output."""
    ramp = torch.linspace(0, 1, 32)
    phase = torch.arange(count)[:, None, None, None] / count
    colours = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    images = (0.5 + 0.5 * torch.sin(9 * (ramp[:, None] + ramp * colours + phase))).float()
    target = images
    if kind == "features":
        generator = torch.Generator().manual_seed(0)
        target = torch.einsum("bchw,ck->bkhw", images, torch.randn(3, channels, generator=generator))
        target = torch.nn.functional.adaptive_avg_pool2d(target, size)
    output = target + 0.1 * target.std() * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    return images, Reconstruction(1, kind, target, output)


def test_learning_curves_draw_every_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    original = figures.small_multiples
    monkeypatch.setattr(figures, "small_multiples", lambda count: drawn.append(original(count)) or drawn[-1])
    learning_curves(write_metrics(tmp_path), tmp_path / "curves.png")
    axes = drawn[0][1]
    assert [axis.get_title("left") for axis in axes] == [
        "Loss",
        "Accuracy (%)",
        "Local loss of each module",
        "Contrast by module",
        "Cross entropy by module",
        "Reconstruction by module",
    ]
    assert [text.get_text() for text in drawn[0][0].legends[0].get_texts()] == [f"module {n}" for n in range(1, 5)]
    validation = axes[1].get_lines()[-1]
    assert list(validation.get_xdata()) == [40, 80, 120, 160, 200]
    assert validation.get_ydata()[-1] == pytest.approx(100 * (0.9 - 0.8 * math.exp(-199 / 80)))
    assert imread(tmp_path / "curves.png").std() > 0.05
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_one_batch_of_end_to_end_training_can_be_drawn(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path)
    logger.log_metrics({"train/loss": 1.0, "epoch": 0}, 0)
    learning_curves(logger.path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_nothing_to_draw_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="log at least one batch"):
        learning_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")


def test_terms_are_grouped_by_module(tmp_path: Path) -> None:
    terms = module_terms(read_series(write_metrics(tmp_path, batches=2)))
    assert {term: sorted(modules) for term, modules in terms.items()} == {
        "loss": [1, 2, 3, 4],
        "contrast": [1, 2, 3],
        "cross_entropy": [4],
        "reconstruction": [1, 2, 3],
    }


def test_running_mean() -> None:
    assert running_mean([1.0, 2.0, 6.0], 1) == [1.0, 2.0, 6.0]
    assert running_mean([0.0, 3.0, 6.0, 9.0, 12.0, 0.0], 2) == pytest.approx([3.0, 4.5, 6.0, 6.0, 6.75, 7.0])


def test_images_are_shown_as_they_are() -> None:
    images, entry = sample("image")
    target, output = as_pixels(entry, 3)
    assert torch.equal(target, images[:3])
    assert torch.equal(output, entry.output[:3].clamp(0, 1))


@pytest.mark.parametrize("channels", [1, 2, 3, 24])
def test_equal_features_get_equal_colours(channels: int) -> None:
    _, entry = sample("features", channels)
    entry.output = entry.target.clone()
    target, output = as_pixels(entry, 5)
    assert target.shape == (5, 3, 8, 8)
    assert torch.equal(target, output)
    assert target.min() == 0 and target.max() == 1


def test_output_is_projected_and_scaled_as_the_target() -> None:
    """The projection is linear, so the mean of target and output must get the mean of their colours."""
    _, entry = sample("features")
    target, output = as_pixels(entry, 8)
    between = Reconstruction(1, "features", entry.target, (entry.target + entry.output) / 2)
    _, middle = as_pixels(between, 8)
    inside = ((target > 0) & (target < 1) & (output > 0) & (output < 1)).nonzero(as_tuple=True)
    assert len(inside[0]) > 500
    assert torch.allclose(middle[inside], ((target + output) / 2)[inside], atol=1e-5)


def test_constant_features_do_not_break_the_figure(tmp_path: Path) -> None:
    images, _ = sample("image")
    flat = Reconstruction(1, "features", torch.ones(8, 5, 4, 4), torch.zeros(8, 5, 4, 4))
    reconstruction_grid([flat], images, tmp_path / "grid.png")
    assert torch.isfinite(as_pixels(flat, 8)[1]).all()


def test_grid_has_a_row_for_the_input_and_two_per_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    original = figures.draw_rows
    monkeypatch.setattr(figures, "draw_rows", lambda entries, *more: rows.extend(entries) or original(entries, *more))
    images, first = sample("features")
    _, second = sample("image")
    second.module = 2
    reconstruction_grid([first, second], images, tmp_path / "grid.png", max_images=6)
    assert [label for label, _ in rows] == [
        "input",
        "module 1\nfeatures 24×8×8",
        "reconstructed",
        "module 2\nimage 3×32×32",
        "reconstructed",
    ]
    assert all(pixels.shape[:2] == (6, 3) for _, pixels in rows)
    assert imread(tmp_path / "grid.png").std() > 0.1


def test_pictures_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    images, entry = sample("image")
    with small_disk(tmp_path / "disk", 64) as disk:
        metrics = write_metrics(tmp_path, batches=2)
        (disk / "old.png").write_bytes(b"old")
        fill(disk)
        for name in ("old.png", "new.png"):
            with pytest.raises(RunFailed, match=rf"{name} cannot be written \(No space left on device\)$"):
                learning_curves(metrics, disk / name)
            with pytest.raises(RunFailed, match=rf"{name} cannot be written \(No space left on device\)$"):
                reconstruction_grid([entry], images[:2], disk / name)
        assert (disk / "old.png").read_bytes() == b"old" and {p.name for p in disk.iterdir()} == {"old.png", "filler"}

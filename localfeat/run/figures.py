"""Draw learning_curves.png and reconstructions.png, without pyplot: no global state, no display needed."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from localfeat.run.loggers.metrics_csv import read_series
from localfeat.utils.errors import UserError
from localfeat.utils.files import failing_in_one_line, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Points = list[tuple[int, float]]

TRAIN, VALIDATION, INK, QUIET = "#3b6fb6", "#d1603d", "#222222", "#8a8a8a"
MODULE_TERM = re.compile(r"train/module_(\d+)/(\w+)")
TERM_TITLES = {"loss": "Local loss of each module"}
COLUMNS = 3
FEATURE_COLOURS = "features: the target's first three principal components as red, green, blue"


class Reconstructed(Protocol):
    """One module's reconstruction: ``target`` and ``output`` are (B, C, H, W) in the same domain.

    ``kind`` is "image" (pixels in [0, 1]) or "features"; ``module`` counts from 1.
    """

    @property
    def module(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def target(self) -> Tensor: ...
    @property
    def output(self) -> Tensor: ...


def learning_curves(metrics_csv: str | Path, png: str | Path, *, title: str = "") -> None:
    """Draw loss, accuracy and every term of the local losses against the number of batches, below ``title``.

    Raises:
        UserError: the file holds no training or validation metrics.
        RunFailed: ``png`` cannot be written.
    """
    series = read_series(metrics_csv)
    terms = module_terms(series)
    panels = [name for name in ("loss", "accuracy") if {f"train/{name}", f"val/{name}"} & set(series)]
    if not panels and not terms:
        raise UserError(f"{metrics_csv} holds no train/... or val/... values to draw: log at least one batch first")
    figure, axes = small_multiples(len(panels) + len(terms))
    for name, axis in zip(panels, axes, strict=False):
        draw_stage_panel(axis, name, series)
    for (term, by_module), axis in zip(terms.items(), axes[len(panels) :], strict=False):
        draw_module_panel(axis, term, by_module, last=max(max(modules) for modules in terms.values()))
    if terms:
        draw_module_legend(figure, axes[len(panels) :])
    draw_title(figure, title)
    save(figure, png)


def draw_title(figure: Figure, title: str) -> None:
    """Write the run's name above all panels."""
    if title:
        figure.suptitle(title, fontsize=10, color=INK, parse_math=False)


def module_terms(series: dict[str, Points]) -> dict[str, dict[int, Points]]:
    """Return term ("loss", "reconstruction", …) -> module -> points; the total loss first, the rest by name."""
    terms: dict[str, dict[int, Points]] = {}
    for name, points in series.items():
        if match := MODULE_TERM.fullmatch(name):
            terms.setdefault(match[2], {})[int(match[1])] = points
    return dict(sorted(terms.items(), key=lambda item: (item[0] != "loss", item[0])))


def small_multiples(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` equal panels in rows of three."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows + 0.3), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in grid[count:]:
        spare.remove()
    for axis in grid[:count]:
        style_axis(axis)
    return figure, grid[:count]


def style_axis(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(QUIET)
    axis.tick_params(colors=INK, labelsize=8, color=QUIET)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("batches", fontsize=8, color=INK)
    axis.margins(x=0.02)


def draw_stage_panel(axis: Axes, name: str, series: dict[str, Points]) -> None:
    """Draw training and validation curves of one metric; accuracies in per cent."""
    factor = 100.0 if name == "accuracy" else 1.0
    axis.set_title("Accuracy (%)" if name == "accuracy" else "Loss", fontsize=10, loc="left", color=INK)
    if train := series.get(f"train/{name}"):
        draw_noisy(axis, train, TRAIN, "training", factor)
    if validation := series.get(f"val/{name}"):
        steps, values = columns(validation, factor)
        axis.plot(steps, values, color=VALIDATION, linewidth=1.6, marker="o", markersize=3.5, label="validation")
    axis.legend(frameon=False, fontsize=8)


def draw_module_panel(axis: Axes, term: str, by_module: dict[int, Points], last: int) -> None:
    """Draw one line per module, from light (the first) to dark (``last``), the same in every panel."""
    from matplotlib import colormaps

    axis.set_title(TERM_TITLES.get(term, f"{term.replace('_', ' ').capitalize()} by module"), fontsize=10, loc="left")
    for module in sorted(by_module):
        shade = colormaps["viridis_r"](0.12 + 0.83 * (module - 1) / max(1, last - 1))
        draw_noisy(axis, by_module[module], shade, f"module {module}")


def draw_module_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Draw one legend below all module panels: inside a panel it would cover the curves."""
    lines = {int(str(line.get_label()).split()[1]): line for axis in axes for line in labelled(axis)}
    handles = [lines[module] for module in sorted(lines)]
    names = [str(line.get_label()) for line in handles]
    per_row = int(figure.get_figwidth() // 1.4)
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), per_row), frameon=False, fontsize=8)


def labelled(axis: Axes) -> list[Line2D]:
    """Return the lines that were given a label; matplotlib names the others ``_child0`` and so on."""
    return [line for line in axis.get_lines() if not str(line.get_label()).startswith("_")]


def draw_noisy(axis: Axes, points: Points, color: object, label: str, factor: float = 1.0) -> None:
    """Draw the values as a pale line and their running mean (over a fortieth of the points) as a strong one."""
    steps, values = columns(points, factor)
    smooth = running_mean(values, max(1, len(values) // 40))
    if len(values) >= 80:
        axis.plot(steps, values, color=color, alpha=0.22, linewidth=0.7)
    axis.plot(steps, smooth, color=color, linewidth=1.6, label=label, marker="o" if len(values) == 1 else None)


def columns(points: Points, factor: float = 1.0) -> tuple[list[int], list[float]]:
    """Return the numbers of batches done (step 0 is the row of the first batch) and the values."""
    return [step + 1 for step, _ in points], [value * factor for _, value in points]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean over ``2 * width + 1`` values around each, fewer at the ends; width 1 leaves them unchanged."""
    if width <= 1:
        return list(values)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = [(max(0, i - width), min(len(values), i + width + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def reconstruction_grid(
    reconstructions: Sequence[Reconstructed],
    images_pixels: Tensor,
    png: str | Path,
    *,
    max_images: int = 8,
    title: str = "",
) -> None:
    """Draw the input images and, for every module, its reconstruction target and output.

    Features have no colours: a module's target and output are both projected onto the first three principal components
    of the target and scaled alike, so equal colours mean equal features.

    Args:
        reconstructions: one entry per module that reconstructs, for the same images.
        images_pixels: the images (B, C, H, W) in [0, 1].
        png: the file to write.
        max_images: the largest number of columns.
        title: the run's name.

    Raises:
        RunFailed: ``png`` cannot be written.
    """
    count = min(max_images, len(images_pixels))
    rows: list[tuple[str, Tensor]] = [("input", as_rgb(images_pixels[:count]))]
    for entry in reconstructions:
        target, output = as_pixels(entry, count)
        size = "×".join(str(n) for n in entry.target.shape[1:])
        what = "image" if entry.kind == "image" else "features"
        rows.append((f"module {entry.module}\n{what} {size}", target))
        rows.append(("reconstructed", output))
    features = any(entry.kind != "image" for entry in reconstructions)
    draw_rows(rows, png, title, FEATURE_COLOURS if features else "")


def as_pixels(entry: Reconstructed, count: int) -> tuple[Tensor, Tensor]:
    """Return target and output of the first ``count`` images as (count, 3, H, W) in [0, 1]."""
    target, output = entry.target[:count].detach().float().cpu(), entry.output[:count].detach().float().cpu()
    if entry.kind == "image":
        return as_rgb(target.clamp(0, 1)), as_rgb(output.clamp(0, 1))
    mean, components = principal_components(target)
    target, output = project(target, mean, components), project(output, mean, components)
    per_component = target.transpose(0, 1).flatten(1)
    low, high = per_component.quantile(torch.tensor([0.01, 0.99]), dim=1)[:, :, None, None]
    span = (high - low).clamp_min(1e-12)
    return ((target - low) / span).clamp(0, 1), ((output - low) / span).clamp(0, 1)


def as_rgb(images: Tensor) -> Tensor:
    """Return (B, 3, H, W): the first three channels of the images, or the first one as grey if there are fewer."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def principal_components(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (C,) and first three principal directions (C, 3) of features (B, C, H, W); zeros where C < 3."""
    flat = features.transpose(1, -1).flatten(0, -2)  # (B·H·W, C)
    mean = flat.mean(0)
    centred = (flat - mean).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    components = vectors.flip(1)[:, :3]
    # An eigenvector's sign is arbitrary; fix it so that the same features always get the same colours.
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    components = components * largest.sign()
    padding = components.new_zeros(len(components), 3 - components.shape[1])
    return mean, torch.cat([components, padding], 1).to(features.dtype)


def project(features: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    """Project features (B, C, H, W) onto the components; return (B, 3, H, W)."""
    return torch.einsum("bchw,ck->bkhw", features - mean[:, None, None], components)


def draw_rows(rows: Sequence[tuple[str, Tensor]], png: str | Path, title: str, note: str) -> None:
    """Draw one labelled row per entry between title and note; pixels are enlarged without smoothing."""
    from matplotlib.figure import Figure

    count = len(rows[0][1])
    figure = Figure(figsize=(1.5 + count * 1.05, 0.1 + len(rows) * 1.05), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for row, (label, images) in zip(axes, rows, strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8, color=INK, labelpad=6)
    draw_title(figure, title)
    if note:
        figure.supxlabel(note, fontsize=7, color=INK)
    save(figure, png)


def save(figure: Figure, png: str | Path) -> None:
    """Draw ``figure`` and write it whole: a crash leaves no partial picture."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    with failing_in_one_line(png):
        write_whole(png, drawn.getvalue())

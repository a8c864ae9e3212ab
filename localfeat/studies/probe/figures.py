"""Draw accuracy_by_depth.png and cka.png from the content of inspection.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from localfeat.run.figures import INK, QUIET, TRAIN, VALIDATION, style_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Found = dict[str, Any]

SHOWN_VALUES = 12
"""The largest number of rows or columns of a matrix whose values are written into its cells."""
NAMES = {"val": "validation", "test": "test"}


def accuracy_by_depth(found: Found, png: str | Path) -> None:
    """Draw the probes' accuracy after every block, with the local modules as bands behind it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.4, 1.8 + 0.42 * len(found["blocks"])), 4.4), layout="constrained")
    axis = figure.subplots()
    style_axis(axis)
    draw_modules(axis, found["blocks"])
    last, reference = len(found["blocks"]) - 1, found["reference"]
    if reference is not None:
        draw_accuracies(axis, reference, last, QUIET, f"{other_name(found)}, ", found["neighbours"])
    draw_accuracies(axis, found, last, TRAIN, f"{found['method']}, " if reference else "", found["neighbours"])
    name = f"{found['method']}, classifier" if found["reference"] else "classifier"
    axis.axhline(100 * found["classifier_accuracy"], color=VALIDATION, linewidth=1.1, linestyle=":", label=name)
    ticks = range(len(found["blocks"]))
    axis.set_xticks(ticks, ["patch\nembed", *(str(number) for number in ticks[1:])])
    axis.set_xlabel("block", fontsize=9, color=INK)
    axis.set_ylabel("accuracy (%)", fontsize=9, color=INK)
    title = f"What can be read off the features ({found['images']:,} {NAMES[found['split']]} images)"
    axis.set_title(title, fontsize=10, loc="left", color=INK, pad=18)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(png, dpi=150)


def draw_modules(axis: Axes, blocks: list[Found]) -> None:
    """Draw a band and a name for each local module; every other band is shaded."""
    count = blocks[-1]["module"]
    start = -0.5
    for module in range(1, count + 1):
        end = max(place for place, block in enumerate(blocks) if block["module"] == module) + 0.5
        if module % 2 and count > 1:
            axis.axvspan(start, end, color="#f0f0ee", linewidth=0, zorder=0)
        name = f"module {module}" if count <= 4 or module == 1 else str(module)
        where = axis.get_xaxis_transform()
        axis.text((start + end) / 2, 1.02, name, transform=where, ha="center", fontsize=8, color=INK)
        start = end
    axis.set_xlim(-0.5, start)


def draw_accuracies(axis: Axes, found: Found, last: int, color: str, prefix: str, neighbours: int) -> None:
    """Draw linear probes as a line with filled dots and kNN as a dashed line with hollow dots, in per cent.

    A network of another depth is stretched to end at block ``last``; the legend then names its number of blocks.
    """
    blocks = found["blocks"]
    places = [last * number / (len(blocks) - 1) for number in range(len(blocks))]
    note = "" if len(blocks) - 1 == last else f" ({len(blocks) - 1} blocks)"
    values = {key: [100 * block[key] for block in blocks] for key in ("linear_probe", "knn")}
    (solid,) = axis.plot(
        places, values["linear_probe"], color=color, linewidth=1.6, label=f"{prefix}linear probe{note}"
    )
    (dashed,) = axis.plot(
        places, values["knn"], color=color, linewidth=1.2, label=f"{prefix}{neighbours} neighbours{note}"
    )
    solid.set(marker="o", markersize=4)
    dashed.set(marker="o", markersize=4, markerfacecolor="white", linestyle="--")


def cka_heat_map(found: Found, png: str | Path) -> None:
    """Draw the CKA of every block (rows) with every block of the other network, with cuts as white lines."""
    from matplotlib.figure import Figure

    cka = found["cka"]
    rows, columns = len(cka["own_blocks"]), len(cka["other_blocks"])
    figure = Figure(figsize=(2.4 + 0.42 * max(columns, 5), 1.6 + 0.42 * max(rows, 5)), layout="constrained")
    axis = figure.subplots()
    matrix = [[float("nan") if value is None else value for value in row] for row in cka["matrix"]]
    image = axis.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
    axis.set_xticks(range(columns), [str(number + 1) for number in cka["other_blocks"]])
    axis.set_yticks(range(rows), [str(number + 1) for number in cka["own_blocks"]])
    axis.tick_params(colors=INK, labelsize=8, length=0)
    axis.spines[:].set_visible(False)
    axis.set_ylabel(f"block of {found['method']}", fontsize=9, color=INK)
    axis.set_xlabel(f"block of {other_name(found)}", fontsize=9, color=INK)
    draw_cuts(axis, found)
    if max(rows, columns) <= SHOWN_VALUES:
        write_values(axis, matrix)
    figure.colorbar(image, ax=axis, shrink=0.85).ax.tick_params(labelsize=8)
    title = f"Linear CKA ({found['images']:,} {NAMES[found['split']]} images)"
    axis.set_title(title, fontsize=10, loc="left", color=INK)
    figure.savefig(png, dpi=150)


def draw_cuts(axis: Axes, found: Found) -> None:
    """Draw white lines at the ends of local modules, each network's along its own axis."""
    other = found["reference"] or found
    for block in ends(found):
        axis.axhline(block + 0.5, color="white", linewidth=2)
    for block in ends(other):
        axis.axvline(block + 0.5, color="white", linewidth=2)


def ends(found: Found) -> list[int]:
    """Return the blocks that a cut follows."""
    return [block["block"] for block in found["blocks"][:-1] if block["ends_module"]]


def write_values(axis: Axes, matrix: list[list[float]]) -> None:
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            color = INK if value > 0.6 else "white"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)


def other_name(found: Found) -> str:
    """Return the other network's method, or a description if the methods or the networks are the same."""
    if found["reference"] is None:
        return "the same network"
    name: str = found["reference"]["method"]
    return name if name != found["method"] else f"{name} (the other run)"

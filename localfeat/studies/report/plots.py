"""The plots of a table, for a light and a dark page. Drawn without pyplot: no global state, no display needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from localfeat.methods.registry import COLOURS
from localfeat.studies.report.documents import Picture
from localfeat.studies.report.labels import place_numbers, spread, wrapped
from localfeat.studies.report.rows import Row, Table
from localfeat.studies.report.series import (
    Curve,
    Weights,
    depth_curves,
    learning_curves,
    loss_weights,
    memory_points,
    pareto_front,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of a page: background, text, quiet text, grid, and how much white the methods' colours get.

    ``lift`` for all of them, up to ``fade`` more from row to row of a method.
    """

    page: str
    ink: str
    quiet: str
    grid: str
    lift: float
    fade: float


LIGHT = Theme(page="#ffffff", ink="#1c2128", quiet="#656d76", grid="#e4e7eb", lift=0.0, fade=0.45)
DARK = Theme(page="#161b22", ink="#e6edf3", quiet="#8d96a0", grid="#2b323b", lift=0.3, fade=0.25)

OTHERS = ("#c2255c", "#5f7a00", "#00838f", "#a0522d")
LINES = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
MARKERS = ("o", "s", "D", "^")

WIDTH = 6.6  # inches
LEGEND = 9  # points, of its text
HANDLE = 2.4  # what stands before a name, in units of the text's size
NAME = 0.92 * (72 * WIDTH - (HANDLE + 2.6) * LEGEND)  # points that are left for a name; drawn, letters are whole pixels
USUAL = 0.75  # of the rows: what more of them have tells none from the others
FIGURE_SPACE = "\u2007"  # as wide as a digit

BANDS = ": mean over seeds, and one standard deviation either side"

Draw = Callable[[Theme], "Figure"]


def plots(table: Table) -> Iterator[tuple[Picture, Draw]]:
    """Return every plot that has data."""
    name = f"{table.number}_"
    points = memory_points(table)
    if len(points) > 1:
        caption = "Accuracy against peak memory. Up and to the left is better; the line is the Pareto front."
        yield _picture(name, "memory", caption, table), lambda theme: _memory(table, theme)
    if learning_curves(table):
        bands = any(curve.std for curve in learning_curves(table))
        caption = f"Validation accuracy over training{BANDS if bands else ''}."
        yield _picture(name, "curves", caption, table), lambda theme: _curves(table, theme)
    if depth_curves(table, "linear_probe"):
        caption = "What the features of each block tell of the class; dots end a local module."
        yield _picture(name, "depth", caption, table), lambda theme: _depth(table, theme)
    if loss_weights(table):
        caption = "Weights of the local losses from the first local module to the last but one."
        yield _picture(name, "weights", caption, table), lambda theme: _weights(table, theme)


def _picture(prefix: str, kind: str, caption: str, table: Table) -> Picture:
    return Picture(f"{prefix}{kind}", caption, f"{caption.split('.')[0]} ({table.title})")


def rendered(figure: Figure, kind: str) -> bytes:
    """Return the figure as ``png`` or ``svg``; the same figure gives the same bytes."""
    import matplotlib

    file = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "localfeat", "svg.fonttype": "path"}):
        figure.savefig(file, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    figure.set_layout_engine("none")  # it stays as it is now laid out, which takes most of the time
    return file.getvalue()


def colour(row: Row, table: Table, theme: Theme) -> str:
    """Return the method's colour, lighter from row to row of the method; lifted for a dark page."""
    from matplotlib.colors import to_hex, to_rgb

    methods = list(dict.fromkeys(other.method for other in table.rows if other.method not in COLOURS))
    base = COLOURS.get(row.method) or OTHERS[methods.index(row.method) % len(OTHERS)]
    own = [other for other in table.rows if other.method == row.method]
    share = theme.lift + theme.fade * own.index(row) / max(1, len(own) - 1)
    red, green, blue = (part + (1 - part) * share for part in to_rgb(base))
    return to_hex((red, green, blue))


def _style(row: Row, table: Table) -> int:
    own = [other for other in table.rows if other.method == row.method]
    return own.index(row) % len(LINES)


def _figure(theme: Theme, names: Sequence[str], panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of one width with ``panels`` beside each other and room for a legend of ``names`` below."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.06, wspace=0.04)
    lines = sum(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(WIDTH, 3.6 + 0.06 * len(names) + 0.15 * lines), layout=layout, facecolor=theme.page)
    axes = figure.subplots(1, panels, squeeze=False).ravel().tolist()
    for axis in axes:
        axis.set_facecolor(theme.page)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(theme.quiet)
        axis.tick_params(colors=theme.ink, labelsize=9, color=theme.quiet)
        axis.grid(color=theme.grid, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _titles(axis: Axes, theme: Theme, title: str, across: str) -> None:
    """What is drawn upwards stands above the axis, where it can be read without turning the head."""
    axis.set_title(title, fontsize=10, loc="left", color=theme.ink)
    axis.set_xlabel(across, fontsize=9, color=theme.quiet)


def _legend(figure: Figure, axis: Axes, theme: Theme) -> None:
    handles, names = axis.get_legend_handles_labels()
    columns = 2 if max(map(len, names)) <= 42 and len(names) > 3 else 1
    figure.legend(
        handles,
        names,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=LEGEND,
        labelcolor=theme.ink,
        handlelength=HANDLE,
    )


def _name(row: Row, table: Table) -> str:
    """Number and label, as many lines as it takes; with the number of modules where a label stands more than once.

    A setting that nearly all rows name with one value is left to the table.
    """
    common = Counter(word for other in table.rows for word in set(other.label.split(" ")) if "=" in word)
    told = " ".join(word for word in row.label.split(" ") if common[word] <= USUAL * len(table.rows))
    alike = [other for other in table.rows if other.label == row.label]
    number = str(row.number).rjust(len(str(table.rows[-1].number)), FIGURE_SPACE)
    name = f"{number}  {told}" + (f", K={row.modules}" if len(alike) > 1 else "")
    return wrapped(name, NAME, LEGEND, indent=f"{FIGURE_SPACE * len(number)}  ")


def _memory(table: Table, theme: Theme) -> Figure:
    points = memory_points(table)
    figure, (axis,) = _figure(theme, [_name(point.row, table) for point in points])
    front = pareto_front(points)
    axis.step(
        [p.memory for p in front], [p.accuracy for p in front], where="post", color=theme.quiet, lw=1.2, ls=(0, (4, 3))
    )
    for point in points:
        shade = colour(point.row, table, theme)
        if point.std is not None:
            axis.errorbar(point.memory, point.accuracy, yerr=point.std, color=shade, elinewidth=1.2, capsize=3)
        marker = MARKERS[_style(point.row, table)]
        axis.plot(
            point.memory,
            point.accuracy,
            marker,
            ms=8,
            color=shade,
            mec=theme.page,
            label=_name(point.row, table),
            zorder=3,
        )
    axis.margins(0.09, 0.12)
    _titles(axis, theme, f"{table.split.capitalize()} accuracy, %", "peak memory of a training step, GiB")
    _legend(figure, axis, theme)
    place_numbers(figure, axis, [(p.memory, p.accuracy, str(p.row.number)) for p in points], theme.ink)
    return figure


def _curves(table: Table, theme: Theme) -> Figure:
    found = learning_curves(table)
    figure, (axis,) = _figure(theme, [_name(curve.row, table) for curve in found])
    _lines(axis, found, table, theme)
    _titles(axis, theme, "Validation accuracy, %", "epochs")
    _whole_numbers(axis)
    _legend(figure, axis, theme)
    return figure


def _lines(axis: Axes, found: Sequence[Curve], table: Table, theme: Theme) -> None:
    """Curves with their bands, each with its row's number at its right end."""
    for curve in found:
        shade = colour(curve.row, table, theme)
        if curve.std is not None:
            low = [mean - std for mean, std in zip(curve.mean, curve.std, strict=True)]
            high = [mean + std for mean, std in zip(curve.mean, curve.std, strict=True)]
            axis.fill_between(curve.x, low, high, color=shade, alpha=0.16, linewidth=0)
        marked = list(curve.marked) or (range(len(curve.x)) if len(curve.x) <= 12 else [len(curve.x) - 1])
        axis.plot(
            curve.x,
            curve.mean,
            color=shade,
            lw=1.7,
            ls=LINES[_style(curve.row, table)],
            marker="o",
            ms=4,
            markevery=list(marked),
            label=_name(curve.row, table),
        )
    axis.margins(x=0.03)
    ends = [(curve.x[-1], curve.mean[-1], str(curve.row.number)) for curve in found]
    for (x, _, number), y in zip(ends, spread(axis, [end[1] for end in ends]), strict=True):
        axis.annotate(
            number,
            (x, y),
            annotation_clip=False,
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=theme.ink,
        )


def _whole_numbers(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))


def _depth(table: Table, theme: Theme) -> Figure:
    panels = (("linear_probe", "Linear probe, %"), ("knn", "20 nearest neighbours, %"))
    found = depth_curves(table, "linear_probe")
    figure, axes = _figure(theme, [_name(curve.row, table) for curve in found], panels=2)
    for axis, (probe, name) in zip(axes, panels, strict=True):
        _lines(axis, depth_curves(table, "knn" if probe == "knn" else "linear_probe"), table, theme)
        _titles(axis, theme, name, "block (0: patch embeddings)")
        _whole_numbers(axis)
    _legend(figure, axes[0], theme)
    return figure


def _weights(table: Table, theme: Theme) -> Figure:
    found = loss_weights(table)
    panels = {"Supervision, γ": [weights.supervision for weights in found]}
    if any(weights.reconstruction for weights in found):
        panels = {"Reconstruction, λ": [weights.reconstruction or () for weights in found], **panels}
    figure, axes = _figure(theme, [_weights_name(weights) for weights in found], panels=len(panels))
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        for index, (weights, values) in enumerate(zip(found, lines, strict=True)):
            _weight_line(axis, weights, values, table, theme, index)
        _titles(axis, theme, name, "local module")
        axis.set_ylim(bottom=0)
        axis.margins(0.06, 0.12)
        axis.set_xticks(range(1, max(len(weights.supervision) for weights in found) + 1))
    _legend(figure, axes[-1], theme)
    return figure


def _weight_line(axis: Axes, weights: Weights, values: Sequence[float], table: Table, theme: Theme, index: int) -> None:
    """Lines that lie upon one another stay visible: those drawn later have smaller marks and broken lines."""
    several = len({row.method for row in weights.rows}) > 1
    axis.plot(
        range(1, len(values) + 1),
        values,
        color=theme.ink if several else colour(weights.rows[0], table, theme),
        lw=1.8,
        ls=LINES[index % len(LINES)],
        marker=MARKERS[index % len(MARKERS)],
        ms=max(4, 8 - index),
        label=_weights_name(weights),
    )


def _weights_name(weights: Weights) -> str:
    """Methods, number of modules and rows."""
    methods = ", ".join(dict.fromkeys(row.method for row in weights.rows))
    numbers = ", ".join(str(row.number) for row in weights.rows)
    rows = f"(row{'s' if len(weights.rows) > 1 else ''} {numbers})"
    return wrapped(f"{methods}, K={weights.rows[0].modules} {rows}", NAME, LEGEND, indent="  ")

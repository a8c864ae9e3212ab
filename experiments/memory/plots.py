"""Plots of memory against work or time, and against depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.memory.tables import GIB

E2E, LOCAL = "#1f5fa8", "#d9761a"


class Point(NamedTuple):
    """One setting."""

    cost: float
    peak_bytes: float
    method: str
    accumulate: int = 1
    label: str = ""

    @property
    def local(self) -> bool:
        return self.method != "e2e"


def trade(points: Sequence[Point], title: str, axis: str, file: Path) -> None:
    """Plot memory against cost with the Pareto fronts of E2E and of local modules, without and with accumulation."""
    figure, axes = plt.subplots(figsize=(9.5, 6.2), dpi=110, layout="constrained")
    whole = [p for p in points if p.accumulate == 1]
    parts = [p for p in points if p.accumulate > 1]
    rivals = [p for p in whole if not p.local]
    for local, colour, name in ((False, E2E, "E2E"), (True, LOCAL, "local modules")):
        chosen = [p for p in whole if p.local == local]
        beaten = [p for p in chosen if local and any(beats(rival, p) for rival in rivals)]
        others = [p for p in chosen if p not in beaten]
        _scatter(axes, others, marker="o", color=colour, label=name, zorder=3)
        label = "local modules, beaten by an E2E point in both"
        _scatter(axes, beaten, marker="o", facecolors="white", edgecolors=colour, label=label, zorder=2)
        edge = sorted(front(chosen))
        axes.step([p.cost for p in edge], [p.peak_bytes / GIB for p in edge], where="post", color=colour, lw=1.2)
        _scatter(
            axes,
            [p for p in parts if p.local == local],
            marker="D",
            facecolors="white" if local else colour,
            edgecolors=colour,
            label=f"{name}, batch accumulated in parts (images per part)",
            zorder=4,
        )
    for point in points:
        if point.label:
            place = (point.cost, point.peak_bytes / GIB)
            axes.annotate(
                point.label, place, xytext=(-5, 0), textcoords="offset points", fontsize=8, ha="right", va="center"
            )
    axes.set(title=title, xlabel=axis, ylabel="predicted peak memory of a step on CUDA (GiB)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(file, metadata={"Software": None})
    plt.close(figure)


def _scatter(axes: plt.Axes, points: Sequence[Point], **style: Any) -> None:
    if points:
        axes.scatter([p.cost for p in points], [p.peak_bytes / GIB for p in points], s=34, linewidths=1.2, **style)


def beats(one: Point, other: Point) -> bool:
    """Return whether ``one`` is better in one figure and not worse in the other."""
    better = one.cost < other.cost or one.peak_bytes < other.peak_bytes
    return better and one.cost <= other.cost and one.peak_bytes <= other.peak_bytes


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other point beats."""
    return [p for p in points if not any(beats(other, p) for other in points)]


def bars(groups: Mapping[str, Mapping[str, float]], title: str, axis: str, file: Path) -> None:
    """Plot groups of horizontal bars: group -> label -> value."""
    labels = list(next(iter(groups.values())))
    height = 0.8 / len(labels)
    figure, axes = plt.subplots(figsize=(9.5, 1.2 + 0.95 * len(groups)), dpi=110, layout="constrained")
    blues, oranges = plt.get_cmap("Blues"), plt.get_cmap("Oranges")
    rivals = [label for label in labels if label.startswith("E2E")]
    for number, label in enumerate(labels):
        share = rivals.index(label) if label in rivals else number - len(rivals)
        colour = (blues if label in rivals else oranges)(0.85 - 0.2 * share)
        places = [group - 0.4 + (number + 0.5) * height for group in range(len(groups))]
        drawn = axes.barh(
            places, [values[label] for values in groups.values()], height * 0.9, color=colour, label=label
        )
        axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=7)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set(title=title, xlabel=axis)
    axes.legend(fontsize=8)
    figure.savefig(file, metadata={"Software": None})
    plt.close(figure)

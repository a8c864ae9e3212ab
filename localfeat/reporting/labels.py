"""Where numbers go in a plot so that they can be read: beside their points and not on one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIRECTIONS = ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))  # off the steps of a front first
DISTANCES = (8, 12, 18)  # points
ROOM = 11.0  # points that a number or a mark takes


def place_numbers(figure: Figure, axis: Axes, marks: Sequence[tuple[float, float, str]], colour: str) -> None:
    """Write each mark's text (x, y, text) where it is furthest from the other marks and texts, near before far."""
    figure.draw_without_rendering()  # the layout decides where the marks are
    scale = figure.dpi / 72
    places = [tuple(axis.transData.transform((x, y)) / scale) for x, y, _ in marks]
    taken = list(places)
    for (x, y, text), place in zip(marks, places, strict=True):
        offsets = [(dx * far, dy * far) for far in DISTANCES for dx, dy in DIRECTIONS]
        offset = min(offsets, key=lambda o: _crowding((place[0] + o[0], place[1] + o[1]), taken))
        taken.append((place[0] + offset[0], place[1] + offset[1]))
        axis.annotate(
            text,
            (x, y),
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            color=colour,
            annotation_clip=False,
        )


def _crowding(place: tuple[float, float], taken: Sequence[tuple[float, float]]) -> float:
    """How much of the room around ``place`` others have."""
    return sum(max(0.0, ROOM - max(abs(place[0] - x), abs(place[1] - y))) for x, y in taken)


def spread(axis: Axes, values: Sequence[float], gap: float = 0.042) -> list[float]:
    """``values`` moved apart so that neighbours are ``gap`` of the axis's height apart, as little as that takes."""
    low, high = axis.get_ylim()
    least = gap * (high - low)
    order = sorted(range(len(values)), key=values.__getitem__)
    groups: list[tuple[float, list[int]]] = []  # centre, members in order
    for index in order:
        groups.append((values[index], [index]))
        while len(groups) > 1 and _too_close(groups[-2], groups[-1], least):
            (_, before), (_, after) = groups[-2:]
            members = before + after
            groups[-2:] = [(sum(values[i] for i in members) / len(members), members)]
    placed = dict.fromkeys(range(len(values)), 0.0)
    for centre, members in groups:
        for rank, index in enumerate(members):
            placed[index] = centre + (rank - (len(members) - 1) / 2) * least
    return [placed[index] for index in range(len(values))]


def _too_close(below: tuple[float, list[int]], above: tuple[float, list[int]], least: float) -> bool:
    room = (len(below[1]) + len(above[1])) / 2 * least
    return above[0] - below[0] < room

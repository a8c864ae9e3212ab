"""Where numbers and names go in a plot so that they can be read: not on one another, and not over its edge."""

from __future__ import annotations

import re
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


def wrapped(text: str, width: float, size: float, indent: str = "") -> str:
    """``text`` in lines of at most ``width`` points, broken at spaces and within what is longer than a line.

    Args:
        size: of the font, in points.
        indent: before every line but the first.
    """
    lines = [""]
    for word in re.findall(r" *[^ ]+", text):
        if _width(lines[-1] + word, size) > width and lines[-1].strip():
            lines.append(indent)
            word = word.lstrip()
        for part in [word] if _width(lines[-1] + word, size) <= width else word:
            if _width(lines[-1] + part, size) > width and lines[-1] != indent:
                lines.append(indent)
            lines[-1] += part
    return "\n".join(lines)


def _width(text: str, size: float) -> float:
    """In points, as matplotlib's own font has it."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return float(text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0])


def spread(axis: Axes, values: Sequence[float], gap: float = 0.042) -> list[float]:
    """``values`` moved apart so that neighbours are ``gap`` of the axis's height apart, as little as that takes.

    All stay within the axis; where it is too low for that many, they are nearer to each other.
    """
    low, high = axis.get_ylim()
    least = min(gap, 1 / max(1, len(values) - 1)) * (high - low)
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
    for rank, index in enumerate(order):  # as many as are below or above still need their room
        placed[index] = max(placed[index], low + rank * least)
        placed[index] = min(placed[index], high - (len(order) - 1 - rank) * least)
    return [placed[index] for index in range(len(values))]


def _too_close(below: tuple[float, list[int]], above: tuple[float, list[int]], least: float) -> bool:
    room = (len(below[1]) + len(above[1])) / 2 * least
    return above[0] - below[0] < room

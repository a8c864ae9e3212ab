"""report.html: one self-contained file, without network requests or scripts."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from localfeat.studies.report.cells import Cell, Column, columns
from localfeat.studies.report.claims import claims
from localfeat.studies.report.documents import Picture
from localfeat.studies.report.provenance import Notes, notes
from localfeat.studies.report.rows import Row, Table
from localfeat.studies.report.runs import Material
from localfeat.studies.report.words import command, facts, missing, progress, questions, seeds, title


class Drawn(NamedTuple):
    """A plot as SVG, for a light and for a dark page."""

    picture: Picture
    light: bytes
    dark: bytes


def html(material: Material, tables: Sequence[Table], drawn: Mapping[int, Sequence[Drawn]]) -> str:
    """Return the page."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("localfeat.studies.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        title=title(material),
        questions=questions(material),
        progress=progress(material),
        missing=missing(material),
        tables=[_table(table, notes(table), drawn.get(table.number, ())) for table in tables],
    )


def _table(table: Table, found: Notes, drawn: Sequence[Drawn]) -> dict[str, Any]:
    shown = columns(table)
    told = [(name, text) for name, text in facts(table, found) if text]
    callout = told.pop(0) if table.split == "validation" else None
    return {
        "number": table.number,
        "title": table.title,
        "callout": callout,
        "columns": [_column(column) for column in shown],
        "rows": [_row(table, row, found, shown) for row in table.rows],
        "notes": found.texts,
        "claims": claims(table),
        "facts": told,
        "pictures": [_picture(picture) for picture in drawn],
    }


def _column(column: Column) -> dict[str, Any]:
    """``kind`` is the class of its cells: the heading's first word."""
    kind = {"#": "number"}.get(column.heading, column.heading.split()[0].strip(",/"))
    return {"heading": column.heading, "hint": column.hint, "numeric": column.numeric, "kind": kind}


def _row(table: Table, row: Row, found: Notes, shown: Sequence[Column]) -> dict[str, Any]:
    cells: list[tuple[dict[str, Any], Cell]] = [(_column(c), c.cell(table, row, found)) for c in shown]
    signs = found.signs.get(row.number, "")
    return {
        "method": row.method,
        "label": row.label,
        "settings": row.label.removeprefix(row.method).split(),
        "signs": signs.split(",") if signs else [],
        "cells": cells,
        "seeds": seeds(row),
        "command": command(row.runs[0]),
    }


def _picture(drawn: Drawn) -> dict[str, str]:
    width, height = _size(drawn.light)
    return {
        "light": _data_uri(drawn.light),
        "dark": _data_uri(drawn.dark),
        "width": width,
        "height": height,
        "alt": drawn.picture.alt,
        "caption": drawn.picture.caption,
    }


def _size(svg: bytes) -> tuple[str, str]:
    """Width and height of the picture, so that the page does not jump while it loads."""
    found = re.search(rb'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert found is not None, "matplotlib writes a viewBox"
    return str(round(float(found[1]))), str(round(float(found[2])))


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"

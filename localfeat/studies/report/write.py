"""Write all files of a report."""

from __future__ import annotations

import re
from pathlib import Path

from localfeat.studies.report.csv_files import rows_csv, runs_csv
from localfeat.studies.report.documents import latex, markdown
from localfeat.studies.report.page import Drawn, html
from localfeat.studies.report.plots import DARK, LIGHT, plots, rendered
from localfeat.studies.report.rows import Table, tables
from localfeat.studies.report.runs import Material
from localfeat.utils.errors import UserError
from localfeat.utils.files import write_whole

PLOT = re.compile(r"\d+_(memory|curves|depth|weights)\.(png|svg)")


def write_report(material: Material, output: Path) -> list[Table]:
    """Write report.md, .csv, .tex, .html, runs.csv and plots/ into ``output``; returns the tables.

    Raises:
        UserError: ``output`` cannot be written to.
    """
    found = tables(material.runs, material.order())
    try:
        (output / "plots").mkdir(parents=True, exist_ok=True)
        drawn = {table.number: _draw(table, output / "plots") for table in found}
        pictures = {number: [one.picture for one in own] for number, own in drawn.items()}
        _remove_others(output / "plots", {one.stem for own in pictures.values() for one in own})
        for name, text in (
            ("report.md", markdown(material, found, pictures)),
            ("report.csv", rows_csv(found)),
            ("runs.csv", runs_csv(material, found)),
            ("report.tex", latex(found)),
            ("report.html", html(material, found, drawn)),
        ):
            write_whole(output / name, text.encode())
    except OSError as error:
        raise UserError(f"output={output}: {error.filename} cannot be written to ({error.strerror})") from error
    return found


def _draw(table: Table, folder: Path) -> list[Drawn]:
    """The plots of a table: for a light page as files, for both kinds of page as what comes back."""
    found = []
    for picture, draw in plots(table):
        light = draw(LIGHT)
        svg = rendered(light, "svg")
        write_whole(folder / f"{picture.stem}.png", rendered(light, "png"))
        write_whole(folder / f"{picture.stem}.svg", svg)
        found.append(Drawn(picture, svg, rendered(draw(DARK), "svg")))
    return found


def _remove_others(folder: Path, stems: set[str]) -> None:
    """Plots of an earlier report that are not in this one."""
    for file in folder.iterdir():
        if PLOT.fullmatch(file.name) and file.stem not in stems:
            file.unlink()

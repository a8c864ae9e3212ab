"""report.md and report.tex."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from localfeat.studies.report.cells import Cell, columns
from localfeat.studies.report.claims import claims
from localfeat.studies.report.provenance import Notes, notes
from localfeat.studies.report.rows import Row, Table
from localfeat.studies.report.runs import Material
from localfeat.studies.report.words import command, facts, missing, progress, questions, seeds, title


class Picture(NamedTuple):
    """A plot: the stem of its files under plots/, what it is called, and what it shows."""

    stem: str
    caption: str
    alt: str


Pictures = Mapping[int, Sequence[Picture]]
"""Number of a table -> its plots."""


def markdown(material: Material, tables: Sequence[Table], pictures: Pictures) -> str:
    """Return the whole report as GitHub Markdown, with links to the plots."""
    parts = [f"# {_escaped(title(material))}", *map(_escaped, questions(material)), f"{progress(material)}."]
    for table in tables:
        parts += _section(table, notes(table), pictures.get(table.number, ()))
    if lost := missing(material):
        parts += ["## Missing", "\n".join(f"- `{line}`" for line in lost)]
    return "\n\n".join(parts) + "\n"


def _section(table: Table, found: Notes, pictures: Sequence[Picture]) -> list[str]:
    parts = [f"## {_escaped(table.title)}", _table(table, found)]
    legend = [f"<sup>{sign}</sup> {_escaped(text)}" for sign, text in found.texts.items()]
    parts += ["  \n".join(legend)] if legend else []
    parts += ["\n".join(f"- {_escaped(claim)}" for claim in claims(table))] if claims(table) else []
    parts += ["\n".join(f"- **{name}**: {_escaped(text)}" for name, text in facts(table, found) if text)]
    parts += [f"![{picture.alt}](plots/{picture.stem}.png)\n\n*{picture.caption}*" for picture in pictures]
    parts += ["### Runs and commands"]
    return [*parts, "\n".join(_row(row) for row in table.rows)]


def _row(row: Row) -> str:
    """Return an item of a numbered list."""
    return f"{row.number}. {_escaped(row.label)}: {seeds(row)}\n\n   ```bash\n   {command(row.runs[0])}\n   ```"


def _table(table: Table, found: Notes) -> str:
    shown = columns(table)
    lines = [[_escaped(column.heading) for column in shown], ["---:" if c.numeric else ":---" for c in shown]]
    lines += [[_markdown_cell(column.cell(table, row, found)) for column in shown] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else _escaped(cell.text)
    return f"{text} <sup>{cell.signs}</sup>" if cell.signs else text


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


def latex(tables: Sequence[Table]) -> str:
    """Return every table as LaTeX; needs the packages booktabs and graphicx (to fit the text width)."""
    head = "% \\usepackage{booktabs,graphicx}\n"
    return head + "\n".join(_latex_table(table, notes(table)) for table in tables)


def _latex_table(table: Table, found: Notes) -> str:
    shown = columns(table)
    rows = [[_latex_cell(column.cell(table, row, found)) for column in shown] for row in table.rows]
    legend = [f"\\textsuperscript{{{sign}}} {tex(text)}" for sign, text in found.texts.items()]
    return "\n".join(
        [
            "\\begin{table}",
            "  \\centering",
            f"  \\caption{{{tex(table.title)}}}",
            "  \\resizebox{\\textwidth}{!}{%",
            f"  \\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in shown)}}}",
            "    \\toprule",
            f"    {' & '.join(tex(column.heading) for column in shown)} \\\\",
            "    \\midrule",
            *(f"    {' & '.join(row)} \\\\" for row in rows),
            "    \\bottomrule",
            "  \\end{tabular}}",
            *(f"  \\par\\footnotesize {line}" for line in legend),
            "\\end{table}",
            "",
        ]
    )


def _latex_cell(cell: Cell) -> str:
    text = f"\\textbf{{{tex(cell.text)}}}" if cell.best else tex(cell.text)
    return f"{text}\\textsuperscript{{{cell.signs}}}" if cell.signs else text


_TEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "×": r"$\times$",
    "–": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def tex(text: str) -> str:
    """Escape every character that LaTeX reads as a command."""
    return "".join(_TEX.get(character, character) for character in text)

"""Tables and plots of finished runs: ``localfeat report outputs/studies/my_study``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from localfeat.run.command_line import one_line_errors
from localfeat.run.composition import unknown_key
from localfeat.run.output import reader_may_leave
from localfeat.utils.errors import UserError

USAGE = """
localfeat report <folder> [<folder> …] [output=report]

  <folder>  of a study, of a sweep, of one run: every finished run below it is read
  output    gets report.html (one page, self-contained), report.md, report.tex, report.csv (a line for each row of
            the tables), runs.csv (a line for each run) and plots/

Runs that differ in nothing but the seed are one row: mean ± sample standard deviation (number of seeds). Accuracy by
depth is drawn for rows of which every run was inspected (localfeat probe).
"""


def split_arguments(arguments: Sequence[str]) -> tuple[list[Path], Path]:
    """Folders to read, and the one to write to. A folder's name may hold ``=``: runs of a study have such names.

    Raises:
        UserError: no folder, one that does not exist, or something that is neither a folder nor ``output=``.
    """
    folders, output = [], Path("report")
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "output" and equals:
            if not value:
                raise UserError("output= is empty: give the folder to write to")
            output = Path(value)
        elif argument.startswith("-"):
            raise UserError(f"{argument}: arguments are folders and output=<folder> (see --help)")
        elif Path(argument).is_dir() or not equals or "/" in key:
            folders.append(Path(argument))
        else:
            raise UserError(unknown_key(key, ["output"]))
    if not folders:
        raise UserError("no folder given: localfeat report <folder> (see --help)")
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise UserError(f"{missing[0]}: there is no such folder")
    return folders, output


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        with reader_may_leave():
            print(USAGE.strip())
        return
    with one_line_errors():
        folders, output = split_arguments(arguments)
        from localfeat.studies.report.runs import read_material
        from localfeat.studies.report.words import counted, missing, progress
        from localfeat.studies.report.write import write_report

        material = read_material(folders)
        tables = write_report(material, output)
        for line in missing(material):
            print(f"missing: {line}")
        rows = sum(len(table.rows) for table in tables)
        print(f"{progress(material)}: {counted(rows, 'row')} in {counted(len(tables), 'table')}")
        print(output / "report.html")


if __name__ == "__main__":
    main()

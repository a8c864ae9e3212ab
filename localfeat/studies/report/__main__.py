"""``python -m localfeat.studies.report``: see :mod:`localfeat.studies.report.command`."""

from localfeat.run.command_line import run_command

if __name__ == "__main__":
    run_command("localfeat.studies.report.command")

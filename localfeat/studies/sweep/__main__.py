"""``python -m localfeat.studies.sweep``: see :mod:`localfeat.studies.sweep.command`."""

from localfeat.run.command_line import run_command

if __name__ == "__main__":
    run_command("localfeat.studies.sweep.command")

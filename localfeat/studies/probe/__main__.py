"""``python -m localfeat.studies.probe``: see :mod:`localfeat.studies.probe.command`."""

from localfeat.run.command_line import run_command

if __name__ == "__main__":
    run_command("localfeat.studies.probe.command")

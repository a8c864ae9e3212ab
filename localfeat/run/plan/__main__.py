"""``python -m localfeat.run.plan``: see :mod:`localfeat.run.plan.command`."""

from localfeat.run.command_line import run_command

if __name__ == "__main__":
    run_command("localfeat.run.plan.command")

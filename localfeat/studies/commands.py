"""``localfeat <command> …``: all commands under one name."""

from __future__ import annotations

import os
import sys

import localfeat
from localfeat.run.command_line import one_line_errors, run_command
from localfeat.utils.text import meant

COMMANDS = {
    "run": ("localfeat.run.command", "train one configuration, or several with -m"),
    "plan": ("localfeat.run.plan.command", "plan what fits into a memory budget, without a GPU"),
    "evaluate": ("localfeat.run.evaluate", "score a finished run on a split"),
    "predict": ("localfeat.run.predict", "write class probabilities for a folder of images"),
    "sweep": ("localfeat.studies.sweep.command", "run the jobs of a study"),
    "report": ("localfeat.studies.report.command", "make tables and plots of finished runs"),
    "probe": ("localfeat.studies.probe.command", "measure what each block of a trained network has learned"),
}


def main() -> None:
    """Run the command that the first argument names with the other arguments."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-sc", "--shell-completion"):
        _complete(arguments)
        return
    if name in COMMANDS:
        sys.argv = [f"localfeat {name}", *arguments]
        run_command(COMMANDS[name][0])
        return
    if name == "--version":
        print(f"localfeat {localfeat.__version__}")
        return
    known = "\n".join(f"  {command:10} {what}" for command, (_, what) in COMMANDS.items())
    if name not in ("--help", "-h"):
        print(
            f"error: {name}: it is one of {', '.join(COMMANDS)}{meant(name, COMMANDS)} (see localfeat --help)",
            file=sys.stderr,
        )
        sys.exit(2)
    with one_line_errors():
        print(f"localfeat <command> …\n\n{known}\n\nlocalfeat <command> --help says more.")


def _complete(arguments: list[str]) -> None:
    """Answer a shell that completes a command line: names of commands, then by Hydra the overrides of ``run``.

    ``install=bash`` prints what the shell evaluates once; in ``query=bash`` the variable COMP_LINE is the line so far.
    """
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if any(argument.startswith("query=") for argument in arguments):
        typed = words[1] if len(words) > 1 else ""
        if typed not in COMMANDS or line == f"{words[0]} {typed}":
            print("\n".join(command for command in COMMANDS if command.startswith(typed)))
            return
        if typed != "run":
            return
        os.environ["COMP_LINE"] = " ".join(["localfeat", *line.split(" ")[2:]])
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
    sys.argv = ["localfeat", "--shell-completion", *arguments]
    run_command(COMMANDS["run"][0])

"""``localfeat <command> …``: all commands under one name."""

from __future__ import annotations

import importlib
import sys

from localfeat.run.output import reader_may_leave

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
    if name in COMMANDS:
        sys.argv = [f"localfeat {name}", *arguments]
        importlib.import_module(COMMANDS[name][0]).main()
        return
    known = "\n".join(f"  {command:10} {what}" for command, (_, what) in COMMANDS.items())
    if name not in ("--help", "-h"):
        print(f"error: {name}: it is one of {', '.join(COMMANDS)} (see localfeat --help)", file=sys.stderr)
        sys.exit(2)
    with reader_may_leave():
        print(f"localfeat <command> …\n\n{known}\n\nlocalfeat <command> --help says more.")

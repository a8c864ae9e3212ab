"""Plan what fits into a memory budget, without a GPU: ``localfeat plan dataset=cifar10 budget=8GiB``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localfeat.run.command_line import arranged, one_line_errors, report
from localfeat.run.composition import composed, plain
from localfeat.run.output import reader_may_leave
from localfeat.run.settings import check_paths, check_plain_settings
from localfeat.utils.errors import UserError
from localfeat.utils.files import failing_in_one_line, write_whole

if TYPE_CHECKING:
    from localfeat.run.plan.planning import Plan

USAGE = """
localfeat plan [group=choice …] [key=value …] budget=8GiB [margin=0.05] [device=cuda] [all=true] [json=file]
                         [--config-dir folder]

Shows which methods, splits and efficiency settings fit, with the largest batch, the predicted peak and the cost of a
step for each. Overrides are those of localfeat.run. A method, split or efficiency setting that you give is kept; the
others are searched: all methods, balanced splits of up to 12 modules, all efficiency settings but compile. No data are
read. The recommendation is the cheapest option that fits, of end-to-end training and the given method (feature_recon
by default).

  budget   the memory that training may use: 8GiB, 24GB, 6000MiB; auto for the free memory of this machine's GPU
  margin   the share of the budget kept free for what cannot be predicted: workspaces of kernels, fragmentation
  device   cuda or cpu: the device to predict for, which decides how autocast and attention work
  all      true: show every number of modules, not only the most useful one of each setting
  json     also write the plan to this file; - prints it instead of the table
"""
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
OWN = {"budget": ..., "margin": "0.05", "device": None, "all": "false", "json": None, "config_dir": None}


def parse_bytes(text: str) -> int:
    """Return the bytes of ``8GiB`` (1024-based) or ``8GB`` (1000-based).

    Raises:
        UserError: not a positive number with a known unit.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if not found or found[2].lower() not in units or float(found[1]) <= 0:
        raise UserError(f"budget={text}: it must be a number with a unit ({', '.join(UNITS)}), like 8GiB, or auto")
    return int(float(found[1]) * units[found[2].lower()])


def split_arguments(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the planner's own values (the last one of each counts) and the overrides of the configuration.

    Raises:
        UserError: an option other than ``--config-dir``, a missing budget, or an override that a single run refuses.
    """
    values, overrides = dict(OWN), []
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.partition("=")
        if key in OWN and key != "config_dir" and equals:
            values[key] = value
        elif key in ("--config-dir", "-cd"):
            values["config_dir"] = _folder(value if equals else next(rest, ""))
        elif argument.startswith("-") or not (equals or argument.startswith("~")):
            raise UserError(f"{argument}: arguments are key=value (see --help)")
        else:
            overrides.append(argument)
    if values["budget"] is ...:
        raise UserError("budget has to be given: budget=8GiB, or budget=auto for this machine's GPU (see --help)")
    if resumed := next((o for o in overrides if o.startswith("resume=")), None):
        raise UserError(f"{resumed}: a resumed run keeps its own configuration; plan without it")
    return values, arranged(overrides)


def _folder(path: str) -> str:
    if not Path(path).is_dir():
        raise UserError(f"--config-dir {path}: there is no such folder")
    return path


def composer(config_dir: str | None) -> Callable[[Sequence[str]], dict[str, Any]]:
    """Return a function that composes the configuration of ``localfeat.run`` for overrides, as plain values."""
    own = [] if config_dir is None else [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"]
    return lambda overrides: plain(composed([*own, *overrides]))


def make_plan(arguments: Sequence[str]) -> tuple[Plan, dict[str, Any]]:
    """Return the plan for a command line and the planner's own values in it."""
    values, overrides = split_arguments(arguments)
    compose = composer(values["config_dir"])
    checked = _checked(values)
    if values["budget"] != "auto":
        parse_bytes(values["budget"])
    values_of_runs = compose(overrides)
    check_plain_settings(values_of_runs)  # before imports that take seconds
    check_paths(values_of_runs)
    from localfeat.run.plan.planning import plan

    hydra = ["--config-dir", values["config_dir"]] if values["config_dir"] else []
    found = plan(overrides, compose, budget=_budget(values["budget"]), options_of_hydra=hydra, **checked)
    return found, values


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    try:
        margin = float(values["margin"])
    except ValueError:
        margin = -1.0
    if not 0 <= margin < 1:
        raise UserError(f"margin={values['margin']}: it lies in [0, 1)")
    if values["device"] not in (None, "cuda", "cpu"):
        raise UserError(f"device={values['device']}: it is cuda or cpu")
    if values["all"] not in ("true", "false"):
        raise UserError(f"all={values['all']}: it is true or false")
    if values["json"] not in (None, "-") and not Path(values["json"]).absolute().parent.is_dir():
        raise UserError(f"json={values['json']}: there is no such folder")
    if values["json"] is not None and (not values["json"] or Path(values["json"]).is_dir()):
        raise UserError(f"json={values['json']}: give a file, or - for the terminal")
    return {"margin": margin, "device": values["device"]}


def _budget(text: str) -> int:
    if text != "auto":
        return parse_bytes(text)
    import torch

    if not torch.cuda.is_available():
        raise UserError("budget=auto: torch finds no usable GPU; give a budget like 8GiB")
    free, _ = torch.cuda.mem_get_info()
    return int(free)


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    if not arguments or "--help" in arguments or "-h" in arguments:
        with reader_may_leave():
            print(USAGE.strip())
        return
    with one_line_errors():
        found, values = make_plan(arguments)
        if values["json"] not in (None, "-"):
            with failing_in_one_line(values["json"]):
                write_whole(values["json"], f"{found.to_json()}\n".encode())
        if values["json"] == "-":
            print(found.to_json())
        else:
            found.show(everything=values["all"] == "true")
        if found.recommended is None:
            report(f"budget={values['budget']}: {found.nothing_fits()}")
            sys.exit(2)


if __name__ == "__main__":
    main()

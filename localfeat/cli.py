"""Command lines: a user's mistake is one line on stderr and exit code 2, anything else a stack trace."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from localfeat.errors import UserError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn mistakes in what was asked for into one line and exit code 2.

    With the environment variable HYDRA_FULL_ERROR=1 nothing is caught.
    """
    if os.environ.get("HYDRA_FULL_ERROR"):
        yield
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and leaving with 1
    try:
        yield
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        if not getattr(error, "reported", False):
            report(line)
        sys.exit(2)
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)


def report(line: str) -> None:
    """Say what is wrong, on stderr."""
    print(f"error: {line}", file=sys.stderr)


def explain(error: Exception) -> str | None:
    """The one line for a mistake of the user's, ``None`` for a fault of ours."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _hydra_line(error)
    return None


def _hydra_line(error: Exception) -> str:
    from omegaconf.errors import ConfigKeyError, MissingMandatoryValue

    from localfeat.config import known_keys, unknown_key

    text = str(error)
    cause = error.__cause__
    if isinstance(cause, ConfigKeyError) and "Could not override" in text:
        choices = [a for a in sys.argv[1:] if re.fullmatch(r"[a-z_]+=[a-z0-9_]+", a)]
        try:
            known = known_keys([c for c in choices if not c.startswith(f"{cause.full_key}=")])
        except Exception:
            known = known_keys([])
        return unknown_key(str(cause.full_key), known)
    if isinstance(error, MissingMandatoryValue):
        key = re.sub(r"^Missing mandatory value: ", "", text.splitlines()[0])
        return f"{key} has to be given: {key}=<value>"
    found = re.search(r"Could not find '([\w/]+)/([^'/]+)'\s+Available options in '[^']+':\s+(.*)", text, re.S)
    if found:
        group, choice, options = found.groups()
        return f"{group}={choice}: it is one of {', '.join(options.split())}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip() and "full_key" not in line)


def parse_arguments(usage: str, defaults: dict[str, Any], arguments: list[str] | None = None) -> dict[str, Any]:
    """``key=value`` arguments over ``defaults`` (``...`` marks those that have to be given).

    Prints ``usage`` and leaves for ``--help``.
    """
    from localfeat.config import unknown_key

    given = sys.argv[1:] if arguments is None else arguments
    if "--help" in given or "-h" in given:
        print(usage.strip())
        sys.exit(0)
    values = dict(defaults)
    for argument in given:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument}: arguments are key=value (see --help)")
        if key not in defaults:
            raise UserError(unknown_key(key, list(defaults)))
        values[key] = value
    missing = [key for key, value in values.items() if value is ...]
    if missing:
        raise UserError(f"{missing[0]} has to be given: {missing[0]}=<value> (see --help)")
    return values

"""Command lines: turn a user's mistake into one line on stderr and exit code 2; a bug keeps its stack trace."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from localfeat.run.conf_dir import conf_dir
from localfeat.run.output import reader_may_leave
from localfeat.utils.errors import RunFailed, Stopped, UserError, contexts
from localfeat.utils.text import as_argument, meant, quoted, shown


@contextmanager
def one_line_errors() -> Iterator[Callable[[Exception], str | None]]:
    """Turn every error that is not a bug into one line and an exit code.

    The exit code is 2 for a user's mistake, 1 for a run that failed, and 128 + the signal's number for a command that
    was stopped (130 for Ctrl-C). Yields ``explain``, for callers that handle errors themselves and continue. With the
    environment variable HYDRA_FULL_ERROR=1 nothing is explained or caught.
    """
    before = os.environ.get("HYDRA_FULL_ERROR")
    if before == "1":
        yield lambda error: None
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing the error and exiting with 1
    try:
        with reader_may_leave():
            yield explain
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        report(line)
        sys.exit(exit_code(error))
    except Stopped as stopped:  # the reason was printed where it was raised
        sys.exit(128 + stopped.signum)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def run_command(module: str) -> None:
    """Import the module of a command and run its ``main``; errors and Ctrl-C while it is imported are one line, too."""
    with one_line_errors():
        main = importlib.import_module(module).main
    main()


def report(line: str) -> None:
    """Print an error to stderr as one line, with control characters escaped."""
    print(f"error: {shown(line)}", file=sys.stderr)


def exit_code(error: Exception) -> int:
    """Return the exit code for an error that ``explain`` has a line for."""
    own = _own(error)
    return 2 if isinstance(own, UserError) or (own is None and _surroundings_line(error) is None) else 1


def _own(error: Exception) -> UserError | RunFailed | None:
    """Return the latest of localfeat's own exceptions in the chain of ``error``."""
    return next((e for e in contexts(error) if isinstance(e, UserError | RunFailed)), None)


def explain(error: Exception, arguments: Sequence[str] | None = None) -> str | None:
    """Return one line for a user's mistake or a failed run, ``None`` for a bug.

    Args:
        error: what was raised.
        arguments: the overrides; those of the command line if None.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    own = _own(error)
    if own is error or (own and isinstance(error, OmegaConfBaseException)):  # raised in a resolver that conf/ calls
        return _memory_line(str(own)) or _own_line(str(own))
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _hydra_line(error, sys.argv[1:] if arguments is None else arguments)
    if isinstance(error, OSError) and _while_hydra_prepares(error):
        return f"output_dir: {error.filename} cannot be written to ({error.strerror})"
    if (mark := getattr(error, "problem_mark", None)) is not None:  # PyYAML's, of a file that Hydra reads
        return f"{mark.name}, line {mark.line + 1}: {getattr(error, 'problem', error)}"
    if isinstance(error, ValueError) and re.search("integer string conversion|Invalid defaults list", str(error)):
        return str(error)  # raised when Hydra reads overrides and files
    return _surroundings_line(error)


def _surroundings_line(error: Exception) -> str | None:
    """Return one line for a failure of the machine (files, memory, a killed worker process), ``None`` otherwise."""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.EMFILE or "Too many open files" in text or "ancdata" in text:
        return "too many open files: raise the limit (ulimit -n 4096), or lower dataset.num_workers"
    if isinstance(error, OSError) and error.errno is not None and not _while_hydra_prepares(error):
        return f"{error.filename or 'a file or pipe'}: {error.strerror}"
    if line := _memory_line(text):
        return line
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return f"out of memory ({text.split('. ')[0] or 'in Python'}): localfeat plan shows what fits"
    if re.match(r"DataLoader worker \(pid.*\) (is killed|exited)", text):
        return f"{text.split('. ')[0]}: possibly out of memory (dataset.num_workers=0 starts no workers)"
    return None


def _memory_line(text: str) -> str | None:
    """Return one line for what torch says when the machine has no memory left, ``None`` for other texts."""
    found = re.search(r"DefaultCPUAllocator.* allocate (\d+) bytes", text)
    return (
        f"out of memory ({int(found[1]) / 2**30:,.2f} GiB asked for): localfeat plan shows what fits" if found else None
    )


def _while_hydra_prepares(error: Exception) -> bool:
    """Return whether Hydra raised ``error`` before the job began, when it creates the run's folder."""
    functions = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return ("run_job" in functions or "sweep" in functions) and "_attempt" not in functions


def _own_line(text: str) -> str:
    """Return a message as one line; if torch wrapped a worker's stack trace into it, only the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(line.startswith("Original Traceback") for line in lines):
        return lines[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
    return " ".join(lines)


def _hydra_line(error: Exception, arguments: Sequence[str]) -> str:
    """Return one line for an error of Hydra or OmegaConf, whose own messages are long and name classes."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue

    text, cause = str(error), error.__cause__
    if isinstance(error, MissingMandatoryValue):
        return _missing(str(error.full_key), arguments)
    if isinstance(error, OverrideParseException):
        key, equals, value = str(error.override).partition("=")
        typed = f"; as text: {as_argument(key, value)}" if key and equals else ""
        return f"{error.override}: not key=value (a list is [1,2]{typed})"
    if "Could not override" in text and isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _unknown_override(str(cause.full_key), arguments)
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        other = f"; another timm model: backbone=timm backbone.name={choice}" if group == "backbone" else ""
        return f"{group}={choice}: it is one of {', '.join(error.options)}{meant(choice, error.options)}{other}"
    if found := re.search(r"Ambiguous value for argument '(.*)'", text):
        key, _, values = found[1].partition("=")
        listed = "" if key in _groups() else f"; a list is '{key}=[{values}]'"
        return f"{found[1]}: several values make a sweep, on the command line with -m{listed}"
    if found := re.search(r"An item is already at '(.*)'\.", text):
        return f"+{found[1]}: this key exists already; leave out the +"
    if found := re.search(r"In '(.*)/(.*)': (?:Could not load '(.*)'|[^$]*Cannot merge DictConfig with)", text):
        fault = f"its defaults name {found[3]}, which is no file" if found[3] else "its file is no key: value lines"
        return f"{found[1]}={found[2]}: {fault}"
    if full_key := getattr(error, "full_key", None):
        return f"{full_key}: {text.splitlines()[0]}"
    text = re.split(r"Config search path:|See https:", text)[0]
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _missing(key: str, arguments: Sequence[str]) -> str:
    """Return the line for a value that has to be given, on the command line or in the user's file of its group."""
    typed = "'split.cuts=[1,2,5]'" if key == "split.cuts" else f"{key}=<value>"
    group, _, name = key.partition(".")
    chosen = [a for a in arguments if a.startswith(f"{group}=")]
    users = [a for a in chosen[-1:] if not (conf_dir() / f"{a.replace('=', '/')}.yaml").is_file()]
    return f"{key} has to be given: {typed}" + "".join(f", or {name}: <value> in the file of {a}" for a in users)


def _unknown_override(key: str, arguments: Sequence[str]) -> str:
    from localfeat.run.composition import known_keys, unknown_key

    choices = [a for a in arguments if re.fullmatch(r"[a-z_]+=[a-z0-9_]+", a) and not a.startswith(f"{key}=")]
    try:
        known = known_keys(choices)
    except Exception:  # another override is wrong, too
        known = known_keys([])
    if found := re.match(r"backbone\.(arguments|variants)\.", key):
        names = [name.removeprefix(found[0]) for name in known if name.startswith(found[0])]
        near = difflib.get_close_matches(key.removeprefix(found[0]), names, n=1, cutoff=0.7)
        suggestion = f"; did you mean {found[0]}{near[0]}?" if near else f"; add it with +{key}=<value>"
        return f"{key}: there is no such key yet{suggestion}"
    return unknown_key(key, known)


_COMPLETIONS = ("install=", "uninstall=", "query=")


def arranged(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command as Hydra reads them, checked.

    Options come before overrides, which Hydra does not read on both sides of an option. Paths that are not Hydra's
    grammar (``weights=epoch=1.ckpt``) are quoted for it.

    Raises:
        UserError: what Hydra would answer with its usage text, with a stack trace, or not at all: an unknown option, a
            group without a choice, or ``~key``, which would remove a key.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]  # argparse's own prints the usage and exits
    given = parser.parse_intermixed_args(list(arguments))
    commands = [name for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(given, name)]
    if given.shell_completion and len([o for o in given.overrides if o.startswith(_COMPLETIONS)]) != 1:
        raise UserError("--shell-completion: give install=bash, uninstall=bash or query=bash (or zsh, fish)")
    if given.resolve and not (given.cfg or given.help):
        raise UserError("--resolve goes with --cfg job or --help")
    if len(commands) > 1:
        raise UserError(f"--{' and --'.join(commands)}: only one of them at a time")
    for position, override in enumerate(given.overrides):
        _check_override(override, [o for o in given.overrides[position + 1 :][:1] if "=" not in o])
    options = list(arguments)
    for override in given.overrides:
        options.remove(override)
    return [*options, *map(_with_quoted_path, given.overrides)]


def _with_quoted_path(override: str) -> str:
    """Return an override of a path with ``~`` expanded, and quoted if Hydra cannot read it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    from localfeat.run.composition import PATHS

    key, equals, value = override.partition("=")
    if equals and key.lstrip("+") in PATHS:
        if value.startswith("~"):
            return f"{key}={quoted(os.path.expanduser(value))}"
        try:
            OverridesParser.create().parse_overrides([override])
        except OverrideParseException:
            return f"{key}={quoted(value)}"
    return override


def _refuse(message: str) -> NoReturn:
    key_value = re.search(r"unrecognized arguments: --?([a-z][\w.]*=\S+)", message)
    raise UserError(f"{message} ({f'write {key_value[1]}' if key_value else 'see --help'})")


def _groups() -> set[str]:
    return {"method", *(path.name for path in conf_dir().iterdir() if path.is_dir())}


def _choices(group: str) -> list[str]:
    from localfeat.methods.registry import METHODS

    return sorted(METHODS) if group == "method" else sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))


def _check_override(override: str, value: list[str]) -> None:
    """Refuse what Hydra explains badly; ``value`` holds the next argument if that is no ``key=value`` either."""
    key, equals, choice = override.partition("=")
    if override.startswith("~"):
        raise UserError(f"{override}: keys cannot be removed; give them another value")
    if not key:
        raise UserError(f"{override}: not key=value")
    if not equals:
        typed = [f"{group}={key}" for group in sorted(_groups()) if key in _choices(group)]
        typed += [f"{key}={text}" for text in [*value, "<value>"] if re.fullmatch(r"[a-z_.]+", key)]
        raise UserError(f"{override}: not key=value{f'; write {typed[0]}' if typed else ' (see --help)'}")
    options = _choices(key) if key in _groups() else []
    if options and (not re.match(r"['\"A-Za-z]", choice) or choice.lower() in ("null", "true", "false")):
        raise UserError(f"{override}: it is one of {', '.join(options)}")


def parse_arguments(usage: str, defaults: dict[str, Any], arguments: list[str] | None = None) -> dict[str, Any]:
    """Return ``defaults`` updated by ``key=value`` arguments; ``...`` marks values that must be given.

    For ``--help``, print ``usage`` and exit.
    """
    from localfeat.run.composition import unknown_key

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
            raise UserError(unknown_key(key, list(defaults), see="--help"))
        values[key] = os.path.expanduser(value) if value.startswith("~") else value
    missing = [key for key, value in values.items() if value is ...]
    if missing:
        raise UserError(f"{missing[0]} has to be given: {missing[0]}=<value> (see --help)")
    return values

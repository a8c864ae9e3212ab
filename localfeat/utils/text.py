"""Text in messages and on command lines: whatever bytes a file name holds, a message stays one harmless line."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterable


def shown(text: str | os.PathLike[str]) -> str:
    r"""Escape everything in ``text`` that does not print: newlines, terminal escapes, bytes that are not UTF-8.

    ``"a\nb"`` becomes ``a\nb`` with a backslash and an n.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in os.fspath(text))


def prints(name: str) -> bool:
    """Return whether ``name`` can appear unescaped in tables, files and terminals."""
    return name.isprintable()


def _escaped(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # Python's surrogate for a file-name byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def quoted(text: str) -> str:
    """Quote a text for Hydra's grammar, which reads two backslashes as one before a quote and at the end."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def meant(typed: str, known: Iterable[str], cutoff: float = 0.7) -> str:
    """Return "; did you mean …?" for a name that is nearly one of the known, else nothing."""
    near = difflib.get_close_matches(typed, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def as_argument(key: str, text: str) -> str:
    """Return ``key=text`` as to be typed: quoted for the shell and for Hydra's grammar, where needed."""
    if re.fullmatch(r"[A-Za-z0-9/._+-]+( +[A-Za-z0-9/._+-]+)*", text):
        return f"{key}={shlex.quote(text)}"
    needs_single = re.search(r"[\\'\"$`!]", text)
    return shlex.quote(f"{key}={quoted(text)}") if needs_single else f"\"{key}='{text}'\""


def as_typed(value: object) -> str:
    """Format a value as a user would type it on the command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_typed(v)}" for key, v in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

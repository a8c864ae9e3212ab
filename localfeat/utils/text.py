"""Names of files in messages: whatever bytes a name holds, the message stays one harmless line."""

from __future__ import annotations

import os
import re


def shown(text: str | os.PathLike[str]) -> str:
    r"""``text`` with everything escaped that does not print: newlines, terminal escapes, bytes that are no UTF-8.

    ``"a\nb"`` becomes ``a\nb`` with a backslash and an n.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in os.fspath(text))


def prints(name: str) -> bool:
    """Whether ``name`` can stand in tables, files and terminals as it is."""
    return name.isprintable()


def _escaped(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # how Python keeps a byte of a file name that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def quoted(text: str) -> str:
    """A text as Hydra's grammar takes it literally: before a quote, and at the end, backslashes count twice."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def as_typed(value: object) -> str:
    """A value as one types it on the command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_typed(v)}" for key, v in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

"""Read YAML files that localfeat wrote as plain values, without resolving, building or repeating anything.

OmegaConf's reader would resolve ``${…}``, which can name environment variables and files, and would follow aliases,
which can expand a few lines to gigabytes. A run's folder may come from somebody else.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from localfeat.utils.errors import UserError

LARGEST_BYTES = 2**18  # config.yaml has some 2 kB, a thousand overrides 50 kB
DEEPEST = 32  # a value of a run's configuration lies 5 deep at most


def read_yaml(file: str | Path) -> Any:
    """Return the dicts, lists, strings, numbers, booleans and nulls in a YAML file.

    Raises:
        UserError: the file cannot be read, is larger than 256 KiB or deeper than 32 levels, has aliases or tags of
            other types, or is not YAML.
    """
    import yaml

    try:
        with open(file, "rb") as handle:
            content = handle.read(LARGEST_BYTES + 1)
        if len(content) > LARGEST_BYTES:
            raise ValueError(f"it is larger than {LARGEST_BYTES:,} bytes")
        text = content.decode()
        _check_shape(text)
        found = yaml.load(text, Loader=_loader())
        str(found)  # raises for numbers too long to print, before a message has to print them
        return found
    except (OSError, ValueError, LookupError, ArithmeticError, yaml.YAMLError) as error:  # not UTF-8, !!bool maybe …
        reason = error.strerror if isinstance(error, OSError) else _said(error)
        raise UserError(f"{file} cannot be read: {reason}") from error


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _check_shape(text: str) -> None:
    """Refuse aliases and deep nesting, event by event, so that neither stack nor memory grows."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"*{event.anchor} is an alias, which no file of localfeat's has")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"it is more than {DEEPEST} levels deep")


@functools.cache
def _loader() -> type:
    """Return PyYAML's safe loader restricted to plain types, with numbers like 1e-3 read as OmegaConf reads them."""
    import yaml
    from omegaconf._utils import get_yaml_loader

    known = ("null", "bool", "int", "float", "str", "seq", "map")
    constructors = {f"tag:yaml.org,2002:{name}" for name in known}

    class Literal(get_yaml_loader()):  # type: ignore[misc]  # numbers and repeated keys as in OmegaConf
        yaml_constructors = {  # noqa: RUF012  (PyYAML's own way)
            tag: made for tag, made in yaml.SafeLoader.yaml_constructors.items() if tag in constructors or tag is None
        }

    return Literal

"""The command line from Python: the same overrides, the same run, the same folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localfeat.utils.errors import RunFailed, UserError

if TYPE_CHECKING:
    from localfeat.run.configuration import RunConfiguration


def compose(overrides: Sequence[str] = ()) -> RunConfiguration:
    """Return the configuration that ``localfeat run <overrides>`` trains, checked.

    Args:
        overrides: what would be typed, such as ``["dataset=cifar10", "split=k4", "optimizer.lr=1e-3"]``.

    Raises:
        UserError: an unknown key or choice, or a value that is wrong.
    """
    from localfeat.run.command_line import arranged
    from localfeat.run.composition import composed, plain
    from localfeat.run.configuration import RunConfiguration

    with _lines_of_the_command(overrides):
        return RunConfiguration.from_values(plain(composed(arranged(overrides))))


def train(overrides: Sequence[str] = (), folder: str | Path | None = None) -> dict[str, Any]:
    """Train as ``localfeat run <overrides>`` does, and return the content of ``summary.json``.

    Args:
        overrides: what would be typed.
        folder: the run's folder; ``None`` for a new one below ``output_dir``, as on the command line.

    Raises:
        UserError: an invalid configuration, missing data, a folder that is in use.
        RunFailed: the environment failed the run, or it diverged.
        Stopped: a signal stopped the run.
    """
    from omegaconf import OmegaConf, open_dict

    from localfeat.run.command import notes_of, run
    from localfeat.run.command_line import arranged
    from localfeat.run.composition import composed

    if folder is not None and (str(folder) == "" or Path(folder).expanduser().is_file()):
        raise UserError(f"folder={str(folder)!r}: give the path of a folder")
    with _lines_of_the_command(overrides):
        cfg = composed(arranged(overrides), hydra_too=True)
        hydra_cfg = cfg.hydra
        where = Path(str(OmegaConf.select(cfg, "hydra.run.dir")) if folder is None else folder).expanduser()
        with open_dict(cfg):
            del cfg["hydra"]
        return run(cfg, where, notes_of(cfg, hydra_cfg))


@contextmanager
def _lines_of_the_command(overrides: Sequence[str]) -> Iterator[None]:
    """Raise errors that are no bugs as ``UserError`` or ``RunFailed``, with the line that the command would print."""
    from localfeat.run.command_line import exit_code, explain

    typed = isinstance(overrides, Sequence) and not isinstance(overrides, str)
    if not typed or not all(isinstance(override, str) for override in overrides):
        raise UserError(f'overrides={overrides!r}: give a list of texts, ["split=k4", "seed=1"]')
    if option := next((override for override in overrides if override.startswith("-")), None):
        raise UserError(f"{option}: options belong to the command line; from Python call once for each job")
    try:
        yield
    except (UserError, RunFailed) as error:
        raise error from None  # its cause says nothing more
    except Exception as error:
        line = explain(error, overrides)
        if line is None:
            raise
        raise (UserError if exit_code(error) == 2 else RunFailed)(line) from None

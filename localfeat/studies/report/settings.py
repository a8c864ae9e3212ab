"""What a run was set to: which settings make two runs the same experiment, and how a row of a table is called."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localfeat.methods.registry import METHODS, settings_of
from localfeat.run.neutral import EARLIER
from localfeat.studies.report.runs import Run
from localfeat.utils.text import as_typed

Settings = dict[str, Any]
"""Dotted key -> value; lists are tuples."""

WITHOUT_EFFECT = (
    "seed", "dataset.seed", "output_dir", "resume", "test", "logger", "callbacks.progress_bar",
    "callbacks.checkpoint_every_n_epochs", "callbacks.checkpoint_every_n_batches", "dataset.root", "dataset.download",
    "dataset.num_workers", "dataset.in_memory", "dataset.image_size", "dataset.in_chans", "dataset.batch_size",
    "trainer.log_every_n_steps", "trainer.num_sanity_val_steps", "trainer.detect_anomaly",
    "optimizer.stop_after_nonfinite", "split",
)  # fmt: skip
"""Keys that change no result, follow another key, or are known better from the summary (the split)."""

OF_TABLE = (
    "dataset.source", "dataset.name", "dataset.classes", "dataset.val_fraction", "split.of.accuracy", "backbone",
    "image_size", "in_chans", "epochs", "trainer.max_steps", "trainer.limit_train_batches", "trainer.limit_val_batches",
    "trainer.limit_test_batches",
)  # fmt: skip
"""Runs that differ in one of these belong to different tables."""

BLOCKS = "blocks"
UNSET = object()


def flat(config: Mapping[str, Any], prefix: str = "") -> Settings:
    """Nested values by dotted key. An empty group is a value: ``{}``."""
    found: Settings = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{key}.")
        else:
            found[key] = _hashable(value)
    return found


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else "{}" if value == {} else value


def below(key: str, keys: Sequence[str]) -> bool:
    """Tell whether ``key`` is one of ``keys`` or lies in one of these groups."""
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def settings(run: Run) -> Settings:
    """Everything that can change the results of ``run`` but the seed; what its method does not use is left out."""
    own = flat(run.config)
    had = {key: value for key, value in EARLIER.items() if key not in own}
    if not str(own.get("decoder._target_")).endswith("InterpDecoder"):
        had.pop("decoder.widths", None)  # of that decoder alone
    found = {key: value for key, value in {**own, **had}.items() if not below(key, WITHOUT_EFFECT)}
    found = {key: _class(value) if key.endswith("_target_") else value for key, value in found.items()}
    for key in unused(found):
        del found[key]
    found["dataset.name"] = dataset_name(run)
    found["dataset.classes"] = tuple(run.summary.get("classes", ()))
    found["split.of.accuracy"] = run.split
    found[BLOCKS] = run.blocks
    if found.get("method.detach") is False and found["method._target_"] != "EndToEnd":  # one module with several losses
        found |= {key: value for key, value in own.items() if below(key, ["split"])}
    found["split.downsample"] = own.get("split.downsample", EARLIER["split.downsample"])
    return found


def _class(path: object) -> str:
    return str(path).rsplit(".", 1)[-1]


def unused(found: Settings) -> list[str]:
    """Keys without effect under the method that ``found`` has. Of a user's own class of methods nothing is known."""
    groups: list[str] = ["decoder._partial_"]  # says how a decoder is built, not which
    own = found.get("method._target_")
    if own not in _OWN:
        return [key for key in found if below(key, groups)]
    if found.get("method.reconstruct") is None:
        groups += ["decoder", "method.reconstruction_loss", "method.reconstruction_weight"]
        groups += ["method.width", "method.kernel"] if own != "HeadAndDecoder" else []
    if found.get("method.supervision", "contrast") != "contrast":
        groups += ["method.temperature", "method.projection_dim"]
    return [key for key in found if below(key, groups)]


_OWN = {type(method).__name__ for method in METHODS.values()}


def dataset_name(run: Run) -> str:
    """The dataset; of an image folder also the folder's name, as the source does not say which data it holds."""
    dataset = run.config["dataset"]
    source = str(dataset["source"])
    return f"{source} {Path(str(dataset.get('root'))).name}" if source == "image_folder" else source


def of_table(found: Settings) -> Settings:
    """The settings that all runs of a table share."""
    return {key: value for key, value in found.items() if below(key, OF_TABLE)}


def frozen(found: Settings) -> tuple[tuple[str, str], ...]:
    """For comparing: 1 and 1.0 are equal, and so is what only looks alike in YAML (1e-3 and 0.001)."""
    return tuple(sorted((key, _text(value)) for key, value in found.items()))


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(_text, value))}]"
    if value is UNSET:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(float(value))
    return as_typed(value)


def varying(rows: Sequence[Settings]) -> list[str]:
    """Keys in which ``rows`` differ, in the order of the configuration.

    A row without a key differs from those with it, unless nothing that it uses has such a key.
    """
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key for key in keys if len({_text(r.get(key, UNSET)) for r in rows if not _useless(key, r, rows)}) > 1]


def labels(rows: Sequence[Settings]) -> list[str]:
    """A name for each row of a table: the method, and every setting that tells it from another row.

    Of the method's own settings those are named that are not its defaults, and those in which rows of one method
    differ; of the others those in which rows of the table differ. The number of modules has a column of its own.
    """
    shared = [key for key in varying(rows) if not below(key, ["method", BLOCKS])]
    return [" ".join([str(row["method.name"]), *_named(row, rows, shared)]) for row in rows]


def _named(row: Settings, rows: Sequence[Settings], shared: Sequence[str]) -> list[str]:
    own = [other for other in rows if other["method.name"] == row["method.name"]]
    differing = [key for key in varying(own) if below(key, ["method"])]
    defaults = method_defaults(str(row["method.name"]))
    changed = [
        key
        for key, value in row.items()
        if below(key, ["method"]) and key in defaults and _text(value) != _text(defaults[key])
    ]
    keys = [key for key in dict.fromkeys([*row, *differing]) if key in changed or key in differing]
    keys = [key for key in [*keys, *shared] if not _useless(key, row, rows)]
    found = [_setting(key, row.get(key, UNSET), rows) for key in keys]
    alike = {other[BLOCKS] for other in own if len(other[BLOCKS]) == len(row[BLOCKS])}
    return [*found, f"blocks={'+'.join(map(str, row[BLOCKS]))}"] if len(alike) > 1 else found


def _useless(key: str, row: Settings, rows: Sequence[Settings]) -> bool:
    """Whether ``row`` has no ``key`` because its method does not use it, or no class like its own has it."""
    target = f"{key.split('.')[0]}._target_"
    alike = [other for other in rows if other.get(target) == row.get(target)]
    return key not in row and (key in unused({**row, key: None}) or not any(key in other for other in alike))


def _setting(key: str, value: Any, rows: Sequence[Settings]) -> str:
    if key == "decoder._target_":
        return f"decoder={decoder_name(str(value))}"
    last = key.rsplit(".", 1)[-1]
    known = {other for row in rows for other in row if other.rsplit(".", 1)[-1] == last}
    name = last if len(known) == 1 and last != "_target_" else key
    return f"{name}={'(not set)' if value is UNSET else shown_value(value)}"


def shown_value(value: Any) -> str:
    """Return a value as typed on the command line; whole numbers without a decimal point."""
    if isinstance(value, tuple):
        return f"[{','.join(map(shown_value, value))}]"
    return str(int(value)) if isinstance(value, float) and value.is_integer() and value < 1e15 else as_typed(value)


def decoder_name(target: str) -> str:
    """What ``decoder=`` calls a decoder's class, the class itself if it is not one of localfeat's."""
    names = {"InterpDecoder": "interp", "OneLayerDecoder": "one_layer", "DeconvDecoder": "deconv"}
    return names.get(_class(target), target)


@functools.cache
def method_defaults(name: str) -> Settings:
    """Return the fields of a registered method; empty for any other."""
    if name not in METHODS:
        return {}
    found = flat({"method": settings_of(METHODS[name])})
    return {key: _class(value) if key.endswith("_target_") else value for key, value in found.items()}

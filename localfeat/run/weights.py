"""Initial weights of a timm model from a file of any usual form, told apart by content; nothing in it is executed."""

from __future__ import annotations

import pickle
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from localfeat.backbones.decompose import decompose
from localfeat.backbones.split import Downsample
from localfeat.backbones.timm_models import image_size_of
from localfeat.utils.errors import UserError
from localfeat.utils.text import shown

NESTED_UNDER = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep a state dict, averaged weights first, as timm prefers them."""
SHOWN_KEYS = 3


def load_backbone_weights(model: nn.Module, path: str | Path, *, reset_classifier: bool = False) -> list[str]:
    """Load weights into ``model``, all of them or none.

    The file holds safetensors, or torch's format, read with ``weights_only=True``. Its state dict may be nested
    (``NESTED_UNDER``) and its keys may carry a wrapper's prefix (``module.``, ``_orig_mod.``, ``model.``, …) or be
    those of a localfeat checkpoint. Keys or shapes that then still differ go through timm's own
    ``checkpoint_filter_fn`` of the model, which converts authors' layouts and resamples position tables. With
    ``reset_classifier`` the first convolution of RGB images is adapted to a model of other channels, as timm does.

    Args:
        model: a timm model.
        path: the file.
        reset_classifier: whether to keep the model's own classifier and ignore the file's.

    Returns:
        What had to be done, as phrases for a message.

    Raises:
        UserError: no such file, a file that needs code to be run, weights of another model or class count, or values
            that are not finite.
    """
    state, notes = read_state(path)
    own = model.state_dict()
    classifier = {key for key in own if key.startswith(classifier_prefixes(model))}
    state = _unwrapped(path, state, model, notes)
    ignored = classifier if reset_classifier else set()
    if _differences(state, own, ignored):
        state = _converted(state, model, notes)
    if reset_classifier:
        state = _with_channels(state, model, notes)
        left_out = {key for key in state if key.startswith(classifier_prefixes(model))}
        notes += ["its classifier is left out"] if left_out else []
        state = {key: value for key, value in state.items() if key not in left_out}
    check_keys(path, state, {key: value for key, value in own.items() if key not in ignored}, classifier)
    for key, value in state.items():
        if own[key].is_floating_point() and not value.is_floating_point():
            raise UserError(f"{path}: {key} holds {str(value.dtype).removeprefix('torch.')}, the model floats")
        if not bool(torch.isfinite(value.to(own[key].dtype)).all()):
            raise UserError(f"{path}: {key} holds values that are not finite; use weights of an earlier checkpoint")
    model.load_state_dict(state, strict=not reset_classifier)
    return notes


def _unwrapped(path: str | Path, state: dict[str, Tensor], model: nn.Module, notes: list[str]) -> dict[str, Tensor]:
    """Return the state under the model's own names, as far as only prefixes stand in the way."""
    if any(key.startswith("local_modules.") for key in state):
        notes.append("the backbone of a localfeat checkpoint")
        return _of_local_modules(state, model)
    if any("_orig_mod." in key for key in state):
        notes.append("prefix _orig_mod. removed")
        state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    body = {key for key in model.state_dict() if not key.startswith(classifier_prefixes(model))}
    counts = _prefixes(state, body)
    (prefix, most), *others = counts.most_common() or [("", 0)]
    if counts[""] == most or 2 * most < len(body):
        return state
    if others and others[0][1] == most:
        raise UserError(f"{path} holds this network under {prefix} and under {others[0][0]}: save one of them alone")
    notes.append(f"prefix {prefix} removed")
    kept = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    notes += [f"entries without it left out: {len(state) - len(kept)}"] if len(kept) < len(state) else []
    return kept


def _prefixes(state: Mapping[str, Tensor], own: set[str]) -> Counter[str]:
    """Count for every prefix how many keys of the state are that prefix before a key of the model."""
    counts = Counter[str]()
    deepest = max((key.count(".") for key in own), default=0)
    for key in state:
        parts = key.rsplit(".", deepest + 1)
        for depth in range(len(parts)):
            if ".".join(parts[depth:]) in own:
                counts["".join(f"{part}." for part in parts[:depth])] += 1
    return counts


def _of_local_modules(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the backbone's part of a learner's state under the backbone's own keys, whatever its split was."""
    place = re.compile(r"local_modules\.(\d+)\.(?:blocks\.(\d+)\.(.+)|((?:stem|objective\.tail)\..+))")
    places = {key: match for key in state if (match := place.fullmatch(key))}
    depths = Counter[int]()  # local module -> its blocks
    for module, block, _, _ in (match.groups() for match in places.values()):
        if block:
            depths[int(module)] = max(depths[int(module)], int(block) + 1)
    names = {}
    for key, match in places.items():
        module, block, rest, end = match.groups()
        below = sum(depth for other, depth in depths.items() if other < int(module))
        names[key] = f"blocks.{below + int(block)}.{rest}" if block else end
    either = (_names_in_parts(model, "next"), _names_in_parts(model, "previous"))
    own = max(either, key=lambda known: len(known.keys() & {*names.values()}))
    return {own.get(name, key): state[key] for key, name in names.items()}


def _names_in_parts(model: nn.Module, downsample: Downsample) -> dict[str, str]:
    """Return name in a learner's part -> name in the model, for every parameter and buffer."""
    own = {id(value): key for key, value in model.state_dict(keep_vars=True).items()}
    backbone = decompose(model, image_size_of(model), downsample=downsample)
    parts = {"stem": backbone.stem, "objective.tail": backbone.tail, "blocks": backbone.blocks}
    return {
        f"{part}.{key}": own[id(value)]
        for part, module in parts.items()
        for key, value in module.state_dict(keep_vars=True).items()
    }


def _with_channels(state: dict[str, Tensor], model: nn.Module, notes: list[str]) -> dict[str, Tensor]:
    """Return the state with its first convolutions, of three channels, for the channels of the model."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    own, adapted = model.state_dict(), {}
    for key in [f"{name}.weight" for name in ([names] if isinstance(names, str) else names)]:
        if key in state and key in own and state[key].shape[1] == 3 != own[key].shape[1]:
            adapted[key] = adapt_input_conv(own[key].shape[1], state[key])
            notes.append(f"{key} adapted to {own[key].shape[1]} channels")
    return {**state, **adapted}


def _differences(state: Mapping[str, Tensor], own: Mapping[str, Tensor], ignored: set[str]) -> bool:
    shapes = [{key: value.shape for key, value in side.items() if key not in ignored} for side in (state, own)]
    return shapes[0] != shapes[1]


def _converted(state: dict[str, Tensor], model: nn.Module, notes: list[str]) -> dict[str, Tensor]:
    """Return what timm's own filter for this architecture makes of the state; the state itself if it fails."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        converted: dict[str, Tensor] = convert(dict(state), model)
    except Exception:  # it expects the layouts it knows; what does not fit is then named by check_keys
        return state
    if _differences(converted, state, set()):
        notes.append("converted by timm")
    return converted


def check_keys(path: str | Path, state: Mapping[str, Tensor], own: Mapping[str, Tensor], classifier: set[str]) -> None:
    """Raise a UserError unless both sides have the same keys and shapes."""
    for problem, keys in (("lacks", own.keys() - state.keys()), ("has unknown", state.keys() - own.keys())):
        if keys:
            raise UserError(f"{path} {problem} {some(keys)}: it must hold the weights of the same timm model")
    other = sorted(key for key in own if own[key].shape != state[key].shape)
    if not other:
        return
    key = other[0]
    theirs, ours = list(state[key].shape), list(own[key].shape)
    if set(other) <= classifier:
        raise UserError(
            f"{path} classifies {theirs[0]} classes, the model {ours[0]}: ask for a fresh classifier "
            "(reset_classifier=True) or build the model with the file's classes"
        )
    raise UserError(f"{path} has {key} of shape {theirs}, the model {ours}: same architecture and image size needed")


def classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the key prefixes of the final classifier, by timm's record of its name (a tuple for distilled models)."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def read_state(path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return name -> tensor from a safetensors or torch file, on the CPU, and where in the file it was, as phrases.

    Raises:
        UserError: no such file, a file that needs code to be run, or content other than plain tensors by name.
    """
    content, notes = _content(path), []
    for _ in NESTED_UNDER:  # a hostile file may nest without end
        inside = content if isinstance(content, Mapping) else {}
        key = next((key for key in NESTED_UNDER if isinstance(inside.get(key), Mapping)), None)
        if key is not None:
            notes.append(f"under {key}")
            content = content[key]
    named = isinstance(content, Mapping) and bool(content) and all(isinstance(key, str) for key in content)
    if not named or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict: give name -> tensor, plain or under {', '.join(NESTED_UNDER)}")
    for name, value in content.items():
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.is_quantized or value.is_complex() or value.untyped_storage().nbytes() < value.nbytes:
            raise UserError(f"{path} has {shown(name)}, which is not a plain tensor: save dense real numbers")
    return dict(content), notes


def _content(path: str | Path) -> Any:
    file = check_exists(path)
    try:
        with file.open("rb") as opened:
            if opened.read(9)[8:] == b"{":  # the header's length in 8 bytes, then JSON
                return load_file(file)
            check_uncompressed(file)
            opened.seek(0)
            return torch.load(opened, "cpu", weights_only=True)  # opened: with a path it goes by the suffix
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path} needs code to be unpickled, which is refused: save a plain state dict") from None
    except Exception as error:  # for other files the readers raise anything, even IndexError
        raise UserError(f"{path} is neither a safetensors nor a torch file, or it is damaged") from error


def check_uncompressed(file: Path) -> None:
    """Refuse a torch file with compressed records: torch writes none, and a few kB could unpack to gigabytes.

    Raises:
        UserError: the file is compressed.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise UserError(f"{file} is a compressed archive, which torch does not write: save a plain state dict")


def check_exists(path: str | Path) -> Path:
    """Return the path of a weights file.

    Raises:
        UserError: there is no such file.
    """
    file = Path(path)
    try:
        there = file.is_file()
    except OSError:  # the name is too long
        there = False
    if not there:
        raise UserError(f"no weights file {shown(path)}: give a .safetensors file or a torch state dict")
    return file


def some(keys: set[str]) -> str:
    """Return the first few keys, and the number of the others."""
    names = [shown(key) for key in sorted(keys)]
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return ", ".join(names[:SHOWN_KEYS]) + more

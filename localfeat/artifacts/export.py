"""The trained backbone as a safetensors file with timm's keys, and loading weights into a timm model."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from localfeat.errors import UserError
from localfeat.writing import write_whole

NESTED_UNDER = ("state_dict", "model")
SHOWN_KEYS = 3


@dataclass(frozen=True)
class BackboneFile:
    """What a backbone file says about its weights, enough to build the model again.

    ``mean`` and ``std`` normalise pixels in [0, 1]; ``arguments`` are further arguments of ``timm.create_model``.
    """

    architecture: str
    num_classes: int
    img_size: int | None
    arguments: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def export_backbone(
    backbone: nn.Module,
    path: str | Path,
    *,
    architecture: str | None = None,
    img_size: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> BackboneFile:
    """Writes the weights of a timm model under exactly timm's keys, and what is needed to build it, as metadata.

    Args:
        backbone: a model made by ``timm.create_model``, classifier included.
        path: the file to write (replaced in one step).
        architecture: timm's name of the model; None: what the model says of itself.
        img_size: side of the training images in pixels; None: as the patch embedding has it, if there is one.
        arguments: further arguments given to ``timm.create_model``; they must be JSON values.
        mean: of the training pixels, per channel; None: what the model says of itself.
        std: likewise.
    """
    own = getattr(backbone, "pretrained_cfg", None) or {}
    name = architecture or own.get("architecture")
    if not name:
        raise UserError(f"a {type(backbone).__name__} does not know its timm name: give export_backbone(architecture=)")
    file = BackboneFile(
        architecture=name,
        num_classes=int(getattr(backbone, "num_classes")),  # noqa: B009  (mypy takes it for a submodule)
        img_size=img_size or own_img_size(backbone),
        arguments=dict(arguments or {}),
        mean=tuple(mean if mean is not None else own.get("mean", ())),
        std=tuple(std if std is not None else own.get("std", ())),
    )
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in vars(file).items()}
    write_whole(path, save(separate_tensors(backbone.state_dict()), metadata={"format": "pt", **metadata}))
    return file


def own_img_size(backbone: nn.Module) -> int | None:
    """The image side that a patch embedding was built for; None for models that take any."""
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    return int(size[0]) if size else None


def separate_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies that share no memory: safetensors stores neither views nor shared tensors."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[key] = tensor
    return result


def read_backbone_file(path: str | Path) -> BackboneFile:
    """The metadata that ``export_backbone`` wrote.

    Raises:
        UserError: not such a file.
    """
    try:
        with safe_open(check_exists(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file ({error}): give a backbone.safetensors") from None
    if "architecture" not in metadata:
        raise UserError(f"{path} does not name its architecture: it was not written by export_backbone")
    return BackboneFile(
        architecture=metadata["architecture"],
        num_classes=json.loads(metadata["num_classes"]),
        img_size=json.loads(metadata["img_size"]),
        arguments=json.loads(metadata["arguments"]),
        mean=tuple(json.loads(metadata["mean"])),
        std=tuple(json.loads(metadata["std"])),
    )


def build_backbone(path: str | Path) -> nn.Module:
    """Builds the timm model that ``export_backbone`` wrote to ``path``, with its weights."""
    import timm

    file = read_backbone_file(path)
    arguments = dict(file.arguments)
    if file.img_size is not None:
        arguments.setdefault("img_size", file.img_size)
    model = timm.create_model(file.architecture, pretrained=False, num_classes=file.num_classes, **arguments)
    load_backbone_weights(model, path)
    return model


def load_backbone_weights(model: nn.Module, path: str | Path, *, reset_classifier: bool = False) -> None:
    """Loads weights with timm's keys into ``model``, all of them or none.

    Args:
        model: a timm model.
        path: a ``.safetensors`` file, or a torch file with the state dict itself or under "state_dict" or "model".
            Torch files are read with ``weights_only=True``: nothing in them is executed.
        reset_classifier: leave the classifier at its initialisation, whatever the file holds for it.

    Raises:
        UserError: no such file, not readable without running code, or weights of another model or class count.
    """
    state = read_state(path)
    own = model.state_dict()
    classifier = [key for key in own if key.startswith(classifier_prefixes(model))]
    if reset_classifier:
        state = {key: value for key, value in state.items() if not key.startswith(classifier_prefixes(model))}
        own = {key: value for key, value in own.items() if key not in classifier}
    check_keys(path, state, own, classifier)
    model.load_state_dict(state, strict=not reset_classifier)


def check_keys(path: str | Path, state: Mapping[str, Tensor], own: Mapping[str, Tensor], classifier: list[str]) -> None:
    """Raises a UserError unless both sides have the same keys and shapes."""
    for problem, keys in (("lacks", own.keys() - state.keys()), ("has unknown", state.keys() - own.keys())):
        if keys:
            raise UserError(f"{path} {problem} {some(keys)}: it must hold the weights of the same timm model")
    other = sorted(key for key in own if own[key].shape != state[key].shape)
    if not other:
        return
    key = other[0]
    theirs, ours = list(state[key].shape), list(own[key].shape)
    if set(other) <= set(classifier):
        raise UserError(
            f"{path} classifies {theirs[0]} classes, the model {ours[0]}: ask for a fresh classifier "
            "(reset_classifier=True) or build the model with the file's classes"
        )
    raise UserError(f"{path} has {key} of shape {theirs}, the model {ours}: same architecture and image size needed")


def classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Key prefixes of the final classifier, from timm's record of its name (a tuple for distilled models)."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Name -> tensor from a safetensors or torch file, on the CPU."""
    file = check_exists(path)
    try:
        content = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} needs code to be unpickled, which is refused: save a plain state dict") from None
    except Exception as error:  # what is no weights file at all makes the readers raise anything, even IndexError
        raise UserError(f"{path} is no safetensors and no torch file: {type(error).__name__} on reading it") from None
    for key in NESTED_UNDER:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} holds no state dict: give name -> tensor, plain or under {' or '.join(NESTED_UNDER)}")
    return dict(content)


def check_exists(path: str | Path) -> Path:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no weights file {path}: give a .safetensors file or a torch state dict")
    return file


def some(keys: set[str]) -> str:
    """The first few keys, and how many more there are."""
    names = sorted(keys)
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return ", ".join(names[:SHOWN_KEYS]) + more

"""Export the trained backbone as a safetensors file with timm's keys, and build a timm model from one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from localfeat.backbones.timm_models import channels_of, check_arguments, model_name
from localfeat.run.weights import check_exists, check_keys, load_backbone_weights, read_state
from localfeat.utils.errors import UserError
from localfeat.utils.files import write_whole


@dataclass(frozen=True)
class BackboneFile:
    """A backbone file's metadata, enough to build the model.

    ``mean`` and ``std`` normalise pixels in [0, 1]; ``arguments`` holds further arguments of ``timm.create_model``.
    """

    architecture: str
    num_classes: int
    img_size: int | tuple[int, int] | None
    arguments: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    in_chans: int = 3


def export_backbone(
    backbone: nn.Module,
    path: str | Path,
    *,
    architecture: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    arguments: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> BackboneFile:
    """Write the weights of a timm model under timm's own keys, with the metadata needed to build it.

    Args:
        backbone: a model made by ``timm.create_model``, classifier included.
        path: the file to write; an existing one is replaced atomically.
        architecture: timm's name of the model; None to take it from the model.
        img_size: the side of the training images in pixels, or height and width, for models that are built for a
            size; None to take it from the patch embedding, if any.
        arguments: further arguments given to ``timm.create_model``; they must be JSON values.
        mean: the channel means used to normalise; None to take them from the model.
        std: the channel standard deviations, likewise.
    """
    own = getattr(backbone, "pretrained_cfg", None) or {}
    name = architecture or own.get("architecture")
    if not name:
        raise UserError(f"{type(backbone).__name__} has no record of timm's name for it: give architecture=")
    file = BackboneFile(
        architecture=name,
        num_classes=int(getattr(backbone, "num_classes")),  # noqa: B009  (mypy takes it for a submodule)
        img_size=img_size or own_img_size(backbone),
        arguments=dict(arguments or {}),
        mean=tuple(mean if mean is not None else own.get("mean", ())),
        std=tuple(std if std is not None else own.get("std", ())),
        in_chans=channels_of(backbone),
    )
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in vars(file).items()}
    write_whole(path, save(separate_tensors(backbone.state_dict()), metadata={"format": "pt", **metadata}))
    return file


def own_img_size(backbone: nn.Module) -> int | tuple[int, int] | None:
    """Return the image size that the patch embedding was built for; None for models that take any size."""
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if not size:
        return None
    height, width = map(int, size)
    return height if height == width else (height, width)


def built_for_a_size(backbone: nn.Module) -> bool:
    """Return whether timm builds models of this class for an image size."""
    return "img_size" in inspect.signature(type(backbone).__init__).parameters


def separate_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors that share no memory: safetensors stores neither views nor shared tensors."""
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
    """Return the metadata that ``export_backbone`` wrote.

    Raises:
        UserError: the file was not written by ``export_backbone``.
    """
    try:
        with safe_open(check_exists(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file ({error}): give a backbone.safetensors") from None
    if "architecture" not in metadata:
        raise UserError(f"{path} does not name its architecture: it was not written by export_backbone")
    try:
        optional = {name: json.loads(metadata[name]) for name in ("in_chans",) if name in metadata}
        found = {name: json.loads(metadata[name]) for name in METADATA} | optional
        return TypeAdapter(BackboneFile).validate_python({"architecture": metadata["architecture"], **found})
    except KeyError as error:
        raise UserError(f"{path} does not name its {error.args[0]}: it was not written by export_backbone") from None
    except (ValueError, RecursionError) as error:  # not JSON, or values of other types
        raise UserError(f"{path} has metadata that export_backbone does not write ({type(error).__name__})") from None


METADATA = ("num_classes", "img_size", "arguments", "mean", "std")


def build_backbone(path: str | Path) -> nn.Module:
    """Build the timm model that ``export_backbone`` wrote to ``path``, with its weights.

    Nothing but this file is read and nothing is downloaded. No memory is allocated before the weights are known to fit.

    Raises:
        UserError: no such file, or metadata that do not describe the weights' network.
    """
    file = read_backbone_file(path)
    check_blocks(path, file.arguments)
    with torch.device("meta"):  # shapes without memory
        planned = _plain_model(path, file)
    check_keys(path, read_state(path)[0], planned.state_dict(), set())
    model = _plain_model(path, file)
    load_backbone_weights(model, path)
    return model


def _plain_model(path: str | Path, file: BackboneFile) -> nn.Module:
    sized: dict[str, Any] = {} if file.img_size is None else {"img_size": file.img_size}
    if file.in_chans != 3:
        sized["in_chans"] = file.in_chans
    try:
        name = model_name(file.architecture, None)
        check_arguments(file.arguments)
        return timm.create_model(name, pretrained=False, num_classes=file.num_classes, **{**sized, **file.arguments})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # timm's models raise anything for unfit arguments
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: timm's {file.architecture} cannot be built like this: {reason}") from error


def check_blocks(path: str | Path, arguments: Mapping[str, Any]) -> None:
    """Refuse more blocks than the file has tensors: even without memory they would take forever to build.

    Raises:
        UserError: an argument asks for too many blocks.
    """
    with safe_open(path, framework="pt") as file:
        tensors = len(file.keys())
    for name in ("depth", "depths", "layers"):
        counts = arguments.get(name, 0)
        if sum(n for n in (counts if isinstance(counts, list) else [counts]) if isinstance(n, int)) > tensors:
            raise UserError(f"{path}: {name}={counts} asks for more blocks than the file has weights")

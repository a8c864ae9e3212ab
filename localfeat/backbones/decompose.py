"""A backbone as stem, indivisible blocks and tail, found in its own forward pass and checked against it.

A cut lies where a single tensor computed from the images is alive and no parameter is needed on both sides. What
depends on no image (position tables, masks, sizes) is computed again in every part that needs it.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from localfeat.backbones.blocks import Blocks
from localfeat.backbones.cuts import find_cuts
from localfeat.backbones.layout import FeatureShape
from localfeat.backbones.modes import evaluating
from localfeat.backbones.parts import Part, build_part
from localfeat.backbones.proof import differences, some_images
from localfeat.backbones.split import Downsample, check_downsample
from localfeat.backbones.tape import Result, Tape, Untraceable, record
from localfeat.backbones.timm_models import channels_of
from localfeat.utils.channels import check_channels
from localfeat.utils.errors import UserError
from localfeat.utils.sizes import sides


class Decomposition(nn.Module):
    """A backbone in parts: ``tail(blocks[-1](… blocks[0](stem(images))))`` are the model's logits.

    Attributes:
        stem, blocks, tail: the parts; their parameters are the backbone's own.
        stage_depths: blocks per stage; a columnar network (ViT) has one block per stage.
        shapes: ``shapes[i]`` is the input of block i, ``shapes[-1]`` the tail's.
        image: channels, height and width of the images.
        num_classes: the number of logits.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[nn.Module],
        stage_depths: Sequence[int],
        shapes: Sequence[FeatureShape],
        image: tuple[int, int, int],
        num_classes: int,
    ) -> None:
        super().__init__()
        self._model = (model,)
        self.image, self.num_classes = image, num_classes
        self.stem, self.tail = parts[0], parts[-1]
        self.blocks = nn.ModuleList(parts[1:-1])
        self.stage_depths, self.shapes = list(stage_depths), list(shapes)

    @property
    def model(self) -> nn.Module:
        """The backbone itself."""
        return self._model[0]

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.tail(x))


def decompose(
    model: nn.Module,
    image_size: int | Sequence[int] = 224,
    *,
    in_chans: int | None = None,
    blocks: str | None = None,
    downsample: Downsample = "next",
) -> Decomposition:
    """Cut ``model`` into stem, blocks and tail and prove that nothing was lost; ``Learner`` takes the result, too.

    Run the model and its parts on one random image of ``image_size`` pixels (evaluation mode, no gradients, the
    global random state untouched) to compare the outputs; on the meta device, which has no values, compare only
    their shapes. Of networks that are not made of timm's and torch's classes compare outputs, gradients and buffers
    of larger batches in evaluation, in training and under autocast, too, on a copy.

    Args:
        model: any network that takes a batch of images (B, C, H, W) and returns logits.
        image_size: side in pixels, or height and width.
        in_chans: channels of the images; ``None`` takes those of the first convolution.
        blocks: a regular expression that the names of blocks, as in ``model.named_modules()``, match as a whole, e.g.
            ``"encoder\\.layers\\.\\d+"``; ``None`` finds timm's.
        downsample: whether layers between two blocks, as between stages, belong to the next block or the previous.

    Raises:
        UserError: no place to cut is found, what the model computes depends on pixels' values (in its own code, not in
            a layer's), or the parts do not add up to the model.
    """
    kind = type(model).__name__
    _check_network(model)
    check_downsample(downsample)
    channels = channels_of(model) if in_chans is None else in_chans
    check_channels(channels)
    image = (channels, *sides(image_size))
    found = Blocks(model, blocks)
    known = _is_known(model)
    key = (_structure(model), frozenset(found.holders), image) if known else None
    met = key in _TAPES
    try:
        tapes = _recorded(model, found, image, key)
        pieces = _pieces(model, tapes, found, image, downsample)
    except Untraceable as error:
        raise UserError(f"cannot split this {kind}: {error}") from error
    _check_parameters(model, pieces)
    on_meta = next(model.parameters()).is_meta
    if not (met and on_meta):  # shapes are known to be equal
        _check_output(model, pieces)
    if not on_meta and not known:
        try:
            twin = copy.deepcopy(model)
        except Exception as error:  # modules raise anything; planners and methods copy networks, too
            raise UserError(f"cannot split this {kind}: it cannot be copied ({error})") from error
        _check_steps(twin, _pieces(twin, tapes, found, image, downsample))
    return pieces


_TAPES: dict[Hashable, dict[bool, Tape]] = {}  # of the networks met last
_KEPT = 32


def _check_network(model: nn.Module) -> None:
    """Refuse networks whose parts could not be run alone or trained."""
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        raise UserError(
            "this backbone has grad_checkpointing set, which has no effect when blocks run one by one: "
            "call set_grad_checkpointing(False) first"
        )
    if hasattr(model, "_orig_mod"):
        raise UserError("this backbone is compiled: give the network itself, model._orig_mod")
    if next(model.parameters(), None) is None:
        raise UserError(f"cannot split this {type(model).__name__}: it has no parameters to train")


def _is_known(model: nn.Module) -> bool:
    """Return whether a network is made of timm's and torch's classes as they are, whose code has been looked at."""
    return all(
        type(module).__module__.startswith(("timm.", "torch."))
        and "forward" not in vars(module)
        and not any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))
        for module in model.modules()
    )


def _recorded(model: nn.Module, blocks: Blocks, image: tuple[int, int, int], key: Hashable | None) -> dict[bool, Tape]:
    """Return the network's steps, from those of an equal network, with the same key, if there was one."""
    if key is None or key not in _TAPES:
        try:
            tapes = record(model, blocks.holders, image)
        except Untraceable:
            raise
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            size = f"{image[1]} x {image[2]} px with {image[0]} channels"
            raise UserError(f"this backbone cannot take images of {size}: {reason}") from error
        if key is None:
            return tapes
        while len(_TAPES) >= _KEPT:
            del _TAPES[next(iter(_TAPES))]
        _TAPES[key] = tapes
    return _TAPES[key]


def _structure(model: nn.Module) -> Hashable:
    """Return a key that is equal for networks whose forward passes are: classes, settings and sizes."""
    modules = []
    for name, module in model.named_modules():
        settings = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
        modules.append((name, type(module), repr(sorted((key, _plain(value)) for key, value in settings.items()))))
    return tuple(modules), tuple((n, tuple(t.shape), t.dtype) for n, t in model.state_dict(keep_vars=True).items())


def _plain(value: Any) -> str:
    """Return the text of a setting, without addresses."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)}"
    return repr(value) if type(value).__module__ in ("builtins", "torch") else type(value).__qualname__


def _pieces(
    model: nn.Module, tapes: Mapping[bool, Tape], blocks: Blocks, image: tuple[int, int, int], downsample: Downsample
) -> Decomposition:
    cuts = {mode: find_cuts(model, tape, blocks, image, downsample) for mode, tape in tapes.items()}
    if [cut[1:] for cut in cuts[True]] != [cut[1:] for cut in cuts[False]]:
        raise Untraceable("its features have other sizes in training than in evaluation")
    edges: dict[bool, list[Any]] = {
        mode: [Result(0), *(cut.at for cut in cuts[mode]), tape.output] for mode, tape in tapes.items()
    }
    count = len(cuts[False]) + 1
    parts = [
        build_part(
            model,
            {mode: (tape, edges[mode][number], edges[mode][number + 1]) for mode, tape in tapes.items()},
            named=number in (0, count - 1),
            tail=number == count - 1,
        )
        for number in range(count)
    ]
    stages = [len(list(group)) for _, group in groupby(cut.stage for cut in cuts[False][1:])]
    depths = [1] * sum(stages) if len(stages) == 1 else stages
    shapes = [cut.shape for cut in cuts[False]]
    pieces = Decomposition(model, parts, depths, shapes, image, _classes(tapes[False]))
    for part in (pieces, *(part for part in parts if isinstance(part, Part))):
        part.training = model.training
    return pieces


def _classes(tape: Tape) -> int:
    """Return the number of logits."""
    shapes = tape.steps[tape.output.step].shapes if isinstance(tape.output, Result) else ()
    if not shapes or len(shapes[0]) != 2:
        raise Untraceable("it returns something else than logits (B, classes); put it into a module that returns these")
    return shapes[0][1]


def _check_parameters(model: nn.Module, pieces: Decomposition) -> None:
    parts = [pieces.stem, *pieces.blocks, pieces.tail]
    found = [id(p) for part in parts for p in part.parameters()]
    lost = [name for name, p in model.named_parameters() if found.count(id(p)) != 1]
    if lost:
        raise UserError(f"cannot split this {type(model).__name__}: {lost[0]} is not in exactly one part")


def _check_steps(model: nn.Module, pieces: Decomposition) -> None:
    """Refuse a network whose parts do something else than it, in a step of training or with another batch."""
    if found := next(differences(model, pieces, pieces.image), None):
        raise UserError(
            f"cannot split this {type(model).__name__}: its parts give another {found}; what it does between "
            "its blocks beside torch's functions (hooks, switched gradients, changed views) has to be in a module"
        )


@torch.no_grad()
def _check_output(model: nn.Module, pieces: Decomposition) -> None:
    images = some_images(model, pieces.image, 1)
    device = images.device
    with evaluating(nn.ModuleList([model, pieces])):
        expected = model(images.clone())
        logits = pieces(images.clone())
        same = logits.shape == expected.shape if device.type == "meta" else torch.equal(logits, expected)
        if not same:
            raise UserError(f"cannot split this {type(model).__name__}: its parts give different logits from the whole")
        if device.type != "meta" and not _in_place(pieces.stem, pieces.shapes[0], images):
            raise UserError(
                f"cannot split this {type(model).__name__}: its features do not lie where they are in the image, as "
                "decoders need"
            )


def _in_place(stem: nn.Module, shape: FeatureShape, images: Tensor) -> bool:
    """Return whether a change in a corner of the image changes the features in the same corner the most."""
    before = shape.to_nchw(stem(images.clone()))
    height, width = images.shape[2:]
    for vertical, horizontal in ((False, True), (True, False)):  # top right, bottom left
        changed = images.clone()
        rows = slice(height * 7 // 8, None) if vertical else slice(0, max(height // 8, 1))
        columns = slice(width * 7 // 8, None) if horizontal else slice(0, max(width // 8, 1))
        changed[:, :, rows, columns] += 1
        moved = (shape.to_nchw(stem(changed)) - before).abs().sum(1)[0]  # (h, w)
        for axis, far in ((1, vertical), (0, horizontal)):
            weights = moved.sum(axis).cpu()
            centre = float(weights @ torch.arange(len(weights), dtype=weights.dtype) / weights.sum())  # may be NaN
            from_corner = len(weights) - 1 - centre if far else centre
            if from_corner > max(0.5, len(weights) / 4):
                return False
    return True

"""Where a backbone can be cut: after which steps of its forward pass a single feature map is alive."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any, NamedTuple, cast

from torch import nn

from localfeat.backbones.blocks import Blocks
from localfeat.backbones.layout import FeatureShape, ShapeReader
from localfeat.backbones.split import Downsample
from localfeat.backbones.tape import Result, Step, Tape, Untraceable


class Cut(NamedTuple):
    """A place to cut, with the blocks between the one before and it."""

    at: Result  # the only tensor that goes on
    shape: FeatureShape
    names: tuple[str, ...]  # blocks between the cut before and this one
    stage: tuple[str, int, int]  # the blocks' stage by its name, height and width of their maps


def find_cuts(
    model: nn.Module, tape: Tape, blocks: Blocks, image: tuple[int, int, int], downsample: Downsample
) -> list[Cut]:
    """Return the cut after the stem and the one after every block, or after several that cannot be told apart."""
    at = [number for number, step in enumerate(tape.steps) if step.target in blocks]
    if not at:
        raise Untraceable("no blocks are found in it; name them: localfeat.decompose(model, blocks=<pattern>)")
    places = _places(model, tape)
    cuts: list[Cut] = []
    names: list[str] = []
    for start, stop in zip([0, *at], [*at, len(tape.steps)], strict=True):
        if start:
            names.append(cast(str, tape.steps[start].target))
        reader = ShapeReader(model, image, cuts[-1].shape if cuts else None)
        for place in _preferred(model, tape, start, stop, downsample):
            shape = reader.read(tape.steps[place].shapes) if place in places else None
            if shape is not None and (start or any(isinstance(s.target, str) for s in tape.steps[: place + 1])):
                own = reader.read(tape.steps[start].shapes) or shape
                stage = (_stage(names[-1]) if names else "", own.height, own.width)
                cuts.append(Cut(Result(place, tape.steps[place].path), shape, tuple(names), stage))
                names = []
                break
    if len(cuts) < 2:
        raise Untraceable("no two places are found in it at which a single feature map is alive")
    return cuts


def _stage(block: str) -> str:
    """Return the name of a block's stage: ``stages.1`` of ``stages.1.blocks.0``, ``blocks`` of ``blocks.3``."""
    return ".".join(block.split(".")[:-1][:2])


def _preferred(model: nn.Module, tape: Tape, start: int, stop: int, downsample: Downsample) -> Iterable[int]:
    """Return the steps between two blocks, the place where one would cut first.

    The stem takes what it can, the last block nothing. A block takes what follows until another layer with weights in a
    matrix, such as its activation, or with ``downsample="previous"`` that, too.
    """
    if stop == len(tape.steps):
        return range(start, stop)
    layer = stop
    if start and downsample == "next":
        between = range(start + 1, stop)
        layer = next((n for n in between if _has_matrix(model, tape.steps[n].target)), stop)
    return [*reversed(range(start, layer)), *range(layer, stop)]


def _has_matrix(model: nn.Module, target: Any) -> bool:
    return isinstance(target, str) and any(p.dim() > 1 for p in model.get_submodule(target).parameters())


def _places(model: nn.Module, tape: Tape) -> set[int]:
    """Return the steps whose result is the only tensor computed from images that is needed later."""
    last: dict[int, int] = {}
    for number, step in enumerate([*tape.steps, Step(None, (tape.output,))]):
        last |= {result.step: number for result in step.results}
    spans = _spans(model, tape)
    found, alive = set(), set[int]()
    for number in range(len(tape.steps)):
        alive = {one for one in alive | ({number} & tape.data) if last.get(one, -1) > number}
        if (
            alive == {number}
            and not tape.steps[number].overwritten
            and not any(first <= number < end for first, end in spans)
        ):
            found.add(number)
    return found


def _spans(model: nn.Module, tape: Tape) -> list[tuple[int, int]]:
    """Return for every parameter the first and the last step with features in which it takes part."""
    through: dict[int, set[int]] = {}  # a step without features -> parameters in what it returns
    uses: dict[int, list[int]] = {}
    for number, step in enumerate(tape.steps):
        own = {id(p) for name in step.members if isinstance(p := attrgetter(name)(model), nn.Parameter)}
        if isinstance(step.target, str):
            own |= {id(p) for p in model.get_submodule(step.target).parameters()}
        own = own.union(*(through.get(result.step, set()) for result in step.results))
        if number in tape.data:
            for parameter in own:
                uses.setdefault(parameter, []).append(number)
        else:
            through[number] = own
    return [(at[0], at[-1]) for at in uses.values()]

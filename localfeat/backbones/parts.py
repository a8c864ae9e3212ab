"""A part of a backbone as a module: the backbone's own one, a chain of them, or the steps between two cuts."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn

from localfeat.backbones.tape import Batch, Device, Dtype, Member, Result, Step, Tape, Untraceable, mapped, name_of


class Part(nn.Module):
    """A part of a backbone that is no chain of modules: some of the backbone's members and the steps between them.

    The members are the backbone's own objects, so training a part trains the backbone. Nothing else of it is held.

    Args:
        model: the backbone.
        tapes: steps per mode (training or not); number 0 is the part's input.
        output: what the part returns, per mode.
        named: whether members keep their names (with ``_`` for dots); otherwise they have numbers.
    """

    def __init__(
        self, model: nn.Module, tapes: Mapping[bool, Sequence[Step]], output: Mapping[bool, Any], *, named: bool
    ) -> None:
        super().__init__()
        names = _in_order(model, [step for steps in tapes.values() for step in steps])
        own = {name: name.replace(".", "_") if named else str(number) for number, name in enumerate(names)}
        self._steps = {mode: [_renamed(step, own) for step in steps] for mode, steps in tapes.items()}
        self._output = dict(output)
        self._data = {mode: Tape(self._steps[mode], None, first=1).data for mode in tapes}
        self._freed = {mode: _last_uses(self._steps[mode], self._output[mode]) for mode in tapes}
        for name in names:
            member = operator.attrgetter(name)(model)
            if isinstance(member, nn.Parameter):
                self.register_parameter(own[name], member)
            elif isinstance(member, Tensor):
                owner, _, last = name.rpartition(".")
                unsaved = model.get_submodule(owner)._non_persistent_buffers_set
                self.register_buffer(own[name], member, persistent=last not in unsaved)
            else:
                self.add_module(own[name], member)

    def forward(self, x: Tensor) -> Any:
        """Take the part's input (B, …); return its output."""
        mode = self.training
        values: dict[int, Any] = {0: x}
        dtype = x.dtype

        def value(mark: Any) -> Any:
            if isinstance(mark, Result):
                found = values[mark.step]
                for index in mark.path:
                    found = found[index]
                return found
            if isinstance(mark, Member):
                return getattr(self, mark.name)
            if isinstance(mark, Batch):
                return len(x) * mark.times
            if isinstance(mark, Dtype):
                return dtype
            return x.device if isinstance(mark, Device) else mark

        for number, step in enumerate(self._steps[mode], start=1):
            target: Any = getattr(self, step.target) if isinstance(step.target, str) else step.target
            args, kwargs = mapped(value, step.args), mapped(value, step.kwargs)
            returned = target(*args, **kwargs)
            values[number] = args[0] if returned is None else returned
            if number in self._data[mode] and isinstance(returned, Tensor):
                dtype = returned.dtype
            del args, kwargs, returned
            for freed in self._freed[mode][number - 1]:
                del values[freed]
        return mapped(value, self._output[mode])

    def extra_repr(self) -> str:
        """Return the steps of evaluation."""
        return "\n".join(f"{name_of(step.target)}{step.args}{dict(step.kwargs)}" for step in self._steps[False])


class Chain(nn.Sequential):
    """Modules of a backbone, one after the other.

    Args:
        reshaping: the numbers of those whose output has another shape than their input.
    """

    def __init__(self, reshaping: Sequence[int]) -> None:
        super().__init__()
        self.reshaping = tuple(reshaping)


def _renamed(step: Step, names: Mapping[str, str]) -> Step:
    """Return the step with the part's own names of its members."""

    def own(mark: Any) -> Any:
        return Member(names[mark.name]) if isinstance(mark, Member) else mark

    target = names[step.target] if isinstance(step.target, str) else step.target
    return Step(target, mapped(own, step.args), mapped(own, step.kwargs))


def _last_uses(steps: Sequence[Step], output: Any) -> list[list[int]]:
    """Return for every step the values that nothing needs after it."""
    last = {number: number for number in range(1, len(steps) + 1)} | {0: 1}
    for number, step in enumerate(steps, start=1):
        last |= {result.step: number for result in step.results}
    for result in Step(None, (output,)).results:
        last.pop(result.step, None)
    return [[value for value, at in last.items() if at == number] for number in range(1, len(steps) + 1)]


def _in_order(model: nn.Module, steps: Sequence[Step]) -> list[str]:
    """Return names of all modules, parameters and buffers that the steps use, in the backbone's own order."""
    used = set()
    for step in steps:
        used |= {*step.members, *([step.target] if isinstance(step.target, str) else [])}
    everything = [*model.named_parameters(), *model.named_buffers(), *model.named_modules()]
    return [name for name, _ in everything if name in used]


def build_part(
    model: nn.Module, spans: Mapping[bool, tuple[Tape, Result, Any]], *, named: bool, tail: bool = False
) -> nn.Module:
    """Return the part between two cuts: one module of the backbone, a chain of them, or steps.

    The names of its parameters stand in checkpoints: identities are left out of chains, and the tail is never a module
    of its own.

    Args:
        model: the backbone.
        spans: per mode its tape, the part's input and its output.
        named: whether modules of a chain keep their names; otherwise they have numbers.
        tail: whether it is the last part.

    Raises:
        Untraceable: the part needs more than its input.
    """
    cut = {mode: _between(*span) for mode, span in spans.items()}
    chains = {mode: _chain(model, *found) for mode, found in cut.items()}
    names = chains[False]
    if names is None or names != chains[True]:
        steps, outputs = ({mode: found[at] for mode, found in cut.items()} for at in (0, 1))
        return Part(model, steps, outputs, named=named)
    tape, start, _ = spans[False]
    shapes = pairwise([tape.steps[start.step].shapes, *(step.shapes for step in cut[False][0])])
    members = [(n, model.get_submodule(n), before != after) for n, (before, after) in zip(names, shapes, strict=True)]
    members = [member for member in members if type(member[1]) is not nn.Identity] or members[:1]
    if len(members) == 1 and not tail:
        return members[0][1]
    chain = Chain([number for number, (_, _, reshapes) in enumerate(members) if reshapes])
    for number, (name, module, _) in enumerate(members):
        chain.add_module(name.replace(".", "_") if named else str(number), module)
    return chain


def _between(tape: Tape, start: Result, stop: Any) -> tuple[list[Step], Any]:
    """Return the steps from one tensor, now number 0, to others, renumbered in their order."""
    wanted: set[int] = set()
    todo = [result for result in Step(None, (stop,)).results if result != start]
    while todo:
        number = todo.pop().step
        if number == 0 or (number == start.step and start.path):
            raise Untraceable("a later part needs the images or an earlier part's other tensors")
        if number not in wanted:
            wanted.add(number)
            todo += [result for result in tape.steps[number].results if result != start]
    numbers = {old: new for new, old in enumerate(sorted(wanted), start=1)}

    def renumbered(mark: Any) -> Any:
        if not isinstance(mark, Result):
            return mark
        return Result(0) if mark == start else Result(numbers[mark.step], mark.path)

    chosen = (tape.steps[old] for old in sorted(wanted))
    steps = [Step(s.target, mapped(renumbered, s.args), mapped(renumbered, s.kwargs), s.shapes) for s in chosen]
    return steps, mapped(renumbered, stop)


def _chain(model: nn.Module, steps: Sequence[Step], output: Any) -> list[str] | None:
    """Return names of modules if the steps are no more than one after the other."""
    for number, step in enumerate(steps):
        if not isinstance(step.target, str) or step.args != (Result(number),) or step.kwargs:
            return None
    names = [cast(str, step.target) for step in steps]
    return names if output == Result(len(steps)) and names and len(set(names)) == len(names) else None

"""Estimate peak memory and time of a study's jobs before they run, without data and without a GPU."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from torch import Tensor

from localfeat.data.datamodule import ImageDataModule
from localfeat.efficiency.settings import Efficiency
from localfeat.memory.balance import balanced_cuts
from localfeat.memory.balanced_split import BalancedSplit
from localfeat.memory.emulation import Target
from localfeat.memory.planner import Planner
from localfeat.run.build import build_datamodule
from localfeat.run.configuration import RunConfiguration
from localfeat.run.plan.planning import workload_of

TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "stl10": 5_000, "svhn": 73_257}
"""Training images of the datasets that would have to read their files to count them."""


@dataclass(frozen=True)
class Finished:
    """The figures of a finished job.

    Attributes:
        images_per_second: the speed of training.
        seconds: the time of training, validation included.
    """

    images_per_second: float
    seconds: float


class Costs:
    """Predictions for configurations, with shared results computed once."""

    def __init__(self) -> None:
        self._planners: dict[str, Planner] = {}
        self._known: dict[str, tuple[int, float]] = {}

    def of(self, configuration: RunConfiguration) -> tuple[int, float] | None:
        """Return peak memory in bytes, and a step's cost relative to plain end-to-end training of the same backbone.

        With ``torch.compile`` neither can be predicted, nor for the sum of all local losses: the result is None.
        """
        if configuration.efficiency.compile or configuration.method.joint:
            return None
        key = setting(configuration)
        if key not in self._known:
            planner = self._planner(configuration)
            cuts = _cuts(configuration, planner)
            peak, cost = planner.evaluate(configuration.method.name, configuration.efficiency, cuts)
            self._known[key] = round(peak), cost
        return self._known[key]

    def work(self, configuration: RunConfiguration) -> float:
        """Return an image's cost in plain end-to-end training, in the planner's unit, to compare backbones."""
        planner = self._planner(configuration)
        costs = planner.costs(next(iter(planner.methods)), Efficiency(), configuration.batch_size)
        return planner.work(costs.module(0, planner.blocks)) / configuration.batch_size

    def _planner(self, configuration: RunConfiguration) -> Planner:
        classes, image, _ = data_facts(_data(configuration), lambda: build_datamodule(configuration))
        key = _key(
            _network(configuration), configuration.values["decoder"], classes, image.nbytes, target(configuration)
        )
        method = configuration.method
        if key not in self._planners:
            plain = replace(configuration, efficiency=replace(configuration.efficiency, compile=False))
            # The budget is irrelevant here: every job is listed, whether it fits or not.
            self._planners[key] = Planner(workload_of(plain, target(configuration)), {method.name: method}, {}, 0)
        planner = self._planners[key]
        if planner.methods.get(method.name) not in (None, method):  # one name, other values
            return Planner(planner.workload, {method.name: method}, {}, 0)
        planner.methods = {**planner.methods, method.name: method}
        return planner


def _cuts(configuration: RunConfiguration, planner: Planner) -> list[int]:
    method, split = configuration.method, configuration.split
    if not method.local:
        return []
    costs = planner.costs(method.name, configuration.efficiency, configuration.batch_size)
    if isinstance(split, BalancedSplit):
        return list(balanced_cuts(costs.module, planner.blocks, split.k))
    return list(accumulate(split.blocks_per_module(costs.pieces.stage_depths)))[:-1]


def target(configuration: RunConfiguration) -> Target:
    """Return the device that a configuration's predictions are for."""
    return "cpu" if configuration.trainer.accelerator == "cpu" else "cuda"


def setting(configuration: RunConfiguration) -> str:
    """Return the settings that a configuration's memory and speed depend on, as text."""
    values, method = configuration.values, configuration.method
    what = {"method": values["method"], "efficiency": values["efficiency"], "dataset": configuration.dataset.source}
    parts = [values["split"] if method.local or method.joint else None, values["decoder"] if method.decodes else None]
    return _key(what, _network(configuration), target(configuration), *parts)


def _network(configuration: RunConfiguration) -> dict[str, Any]:
    """Return the backbone and how it is trained, without the objectives."""
    backbone = configuration.backbone
    return {
        "backbone": {"name": backbone.name, "variants": backbone.variants, "arguments": backbone.arguments},
        "trained": [
            configuration.trainer.precision,
            configuration.optimizer.accumulate,
            configuration.callbacks.ema,
            configuration.dataset.mixes,
        ],
        "image_size": configuration.image_size,
        "in_chans": configuration.in_chans,
        "batch_size": configuration.batch_size,
    }


def _key(*parts: object) -> str:
    return json.dumps(parts, sort_keys=True, default=str)


_FACTS: dict[str, tuple[int, Tensor, int | None]] = {}


def data_facts(key: str, make: Callable[[], ImageDataModule]) -> tuple[int, Tensor, int | None]:
    """Return classes, an image without data and training images; cached, since an image folder must list its files."""
    if key not in _FACTS:
        made = make()
        _FACTS[key] = made.num_classes, made.source.example, made.source.size("train")
    return _FACTS[key]


def _data(configuration: RunConfiguration) -> str:
    return _key(
        configuration.dataset.source, configuration.dataset.root, configuration.image_size, configuration.in_chans
    )


def images_to_train(configuration: RunConfiguration) -> int | None:
    """Return the number of images trained on over all epochs; None if the data would have to be read to know."""
    name = configuration.dataset.source
    count = TRAINING_IMAGES.get(name) or data_facts(_data(configuration), lambda: build_datamodule(configuration))[2]
    if count is None:
        return None
    held_out = round(count * configuration.dataset.val_fraction)
    batches: int = (count - held_out) // configuration.batch_size
    limit, most = configuration.trainer.limit_train_batches, configuration.trainer.max_steps
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = configuration.epochs * batches
    return (steps if most == -1 else min(steps, most)) * configuration.batch_size


@dataclass(frozen=True)
class Speeds:
    """Estimates of training speed from the best source available.

    Args:
        costs: the predicted costs.
        finished: pairs of a configuration and its figures.
        given: images per second of end-to-end training with the reference backbone, given by the user.
        measure: measures the same on this machine; called only if nothing else is known.
        reference: the configuration with the reference backbone.
    """

    costs: Costs
    finished: Sequence[tuple[RunConfiguration, Finished]]
    given: float | None
    measure: Callable[[RunConfiguration], float]
    reference: RunConfiguration

    def of(self, configuration: RunConfiguration) -> tuple[float, str] | None:
        """Return images per second and their source; None if the cost is not known."""
        same = [run.images_per_second for other, run in self.finished if setting(other) == setting(configuration)]
        if same:
            return statistics.median(same), "finished jobs"
        own = self.costs.of(configuration)
        if own is None:
            return None
        alike = [
            run.images_per_second * known[1]
            for other, run in self.finished
            if _network(other) == _network(configuration) and (known := self.costs.of(other))
        ]
        if alike:
            return statistics.median(alike) / own[1], "finished jobs of the same backbone"
        scale = self.costs.work(self.reference) / self.costs.work(configuration)
        return self._reference_speed[0] * scale / own[1], self._reference_speed[1]

    @cached_property
    def _reference_speed(self) -> tuple[float, str]:
        if self.given is not None:
            return self.given, "speed="
        return self.measure(self.reference), "measured here"


def cheapest(configurations: Iterable[RunConfiguration], costs: Costs) -> RunConfiguration:
    """Return the configuration with the cheapest backbone."""
    distinct = {_key(_network(configuration)): configuration for configuration in configurations}
    return min(distinct.values(), key=costs.work)

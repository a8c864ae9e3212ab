"""What the jobs of a study will need, before any runs: peak memory and time, without data and without a GPU."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from localfeat.data import ImageDataModule
from localfeat.efficiency.settings import Efficiency
from localfeat.memory.balance import balanced_cuts
from localfeat.memory.balanced_split import BalancedSplit
from localfeat.memory.emulation import Target
from localfeat.memory.planner import Planner
from localfeat.methods.base import Method
from localfeat.run.build import Config, build_datamodule, check
from localfeat.run.configuration import construct
from localfeat.run.plan.planning import workload_of

TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "stl10": 5_000, "svhn": 73_257}
"""Of the sources that would have to read their files to know."""


@dataclass(frozen=True)
class Finished:
    """What a finished job measured.

    Attributes:
        images_per_second: of training.
        seconds: of training, validation included.
    """

    images_per_second: float
    seconds: float


class Costs:
    """Predictions for configurations; what two of them have in common is worked out once."""

    def __init__(self) -> None:
        self._planners: dict[str, Planner] = {}
        self._known: dict[str, tuple[int, float]] = {}

    def of(self, config: Config) -> tuple[int, float] | None:
        """Peak memory in bytes, and a step's cost relative to plain end-to-end training of the same backbone.

        None where they are not known: with ``torch.compile``.
        """
        if config["efficiency"].get("compile"):
            return None
        key = setting(config)
        if key not in self._known:
            planner = self._planner(config)
            name, efficiency = config["method"]["name"], construct(config["efficiency"], "efficiency")
            peak, cost = planner.evaluate(name, efficiency, _cuts(config, planner, efficiency))
            self._known[key] = round(peak), cost
        return self._known[key]

    def work(self, config: Config) -> float:
        """What an image costs in plain end-to-end training, in the planner's unit: for ratios between backbones."""
        planner = self._planner(config)
        costs = planner.costs(next(iter(planner.methods)), Efficiency(), config["batch_size"])
        return planner.work(costs.segment(0, planner.blocks)) / config["batch_size"]

    def _planner(self, config: Config) -> Planner:
        classes, shape, _ = data_facts(_data(config), lambda: build_datamodule(config))
        key = _key(_network(config), config["decoder"], classes, shape, target(config))
        method: Method = construct(config["method"], "method")
        if key not in self._planners:
            plain = {**config, "efficiency": {**config["efficiency"], "compile": False}}
            # No budget: what does not fit is for the reader to see.
            self._planners[key] = Planner(workload_of(plain, target(config)), {method.name: method}, {}, 0)
        planner = self._planners[key]
        if planner.methods.get(method.name) not in (None, method):  # one name, other values
            return Planner(planner.workload, {method.name: method}, {}, 0)
        planner.methods = {**planner.methods, method.name: method}
        return planner


def _cuts(config: Config, planner: Planner, efficiency: Efficiency) -> list[int]:
    method: Method = construct(config["method"], "method")
    if not method.local:
        return []
    split = construct(config["split"], "split")
    costs = planner.costs(method.name, efficiency, config["batch_size"])
    if isinstance(split, BalancedSplit):
        return list(balanced_cuts(costs.segment, planner.blocks, split.k))
    return list(accumulate(split.blocks_per_module(costs.pieces.stage_depths)))[:-1]


def target(config: Config) -> Target:
    """Whose memory a configuration's predictions are for."""
    return "cpu" if config["trainer"]["accelerator"] == "cpu" else "cuda"


def setting(config: Config) -> str:
    """What a configuration's memory and speed depend on, as text."""
    method = {"method": config["method"], "efficiency": config["efficiency"], "dataset": config["dataset"]["source"]}
    local = construct(config["method"], "method").local
    decodes = construct(config["method"], "method").decodes
    parts = [config["split"] if local else None, config["decoder"] if decodes else None]
    return _key(method, _network(config), target(config), *parts)


def _network(config: Config) -> dict[str, Any]:
    """The backbone and how it is trained, apart from the objectives."""
    named = ("image_size", "batch_size")
    backbone = {key: config["backbone"][key] for key in ("name", "variants", "arguments")}
    mixes = bool(config["dataset"].get("mixup") or config["dataset"].get("cutmix"))
    trained = [config["trainer"]["precision"], config["optimizer"]["accumulate"], config["callbacks"]["ema"], mixes]
    return {"backbone": backbone, "trained": trained, **{key: config[key] for key in named}}


def _key(*parts: object) -> str:
    return json.dumps(parts, sort_keys=True, default=str)


_FACTS: dict[str, tuple[int, tuple[int, int], int | None]] = {}


def data_facts(key: str, make: Callable[[], ImageDataModule]) -> tuple[int, tuple[int, int], int | None]:
    """Classes, height and width, training images; asked once, since an image folder reads all its names for it."""
    if key not in _FACTS:
        made = make()
        _FACTS[key] = made.num_classes, made.source.image_shape, made.source.size("train")
    return _FACTS[key]


def _data(config: Config) -> str:
    return _key(*(config["dataset"][name] for name in ("source", "root", "image_size")))


def images_to_train(config: Config) -> int | None:
    """Images that go through training, epochs counted; None if the data have to be read for it."""
    name = config["dataset"]["source"]
    count = TRAINING_IMAGES.get(name) or data_facts(_data(config), lambda: build_datamodule(config))[2]
    if count is None:
        return None
    held_out = round(count * config["dataset"]["val_fraction"])
    batches: int = (count - held_out) // config["batch_size"]
    limit, most = config["trainer"]["limit_train_batches"], config["trainer"]["max_steps"]
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = config["epochs"] * batches
    return (steps if most == -1 else min(steps, most)) * config["batch_size"]


@dataclass(frozen=True)
class Speeds:
    """How fast configurations train, from the best that is known.

    Args:
        costs: relative ones.
        finished: pairs of a configuration and what it measured.
        given: images per second of end-to-end training with the reference backbone, as the user says.
        measure: finds the same out here; called only if nothing else is known.
        reference: the configuration whose backbone ``given`` and ``measure`` are about.
    """

    costs: Costs
    finished: Sequence[tuple[Config, Finished]]
    given: float | None
    measure: Callable[[Config], float]
    reference: Config

    def of(self, config: Config) -> tuple[float, str] | None:
        """Images per second, and what they come from; None where costs are not known."""
        same = [run.images_per_second for other, run in self.finished if setting(other) == setting(config)]
        if same:
            return statistics.median(same), "finished jobs"
        own = self.costs.of(config)
        if own is None:
            return None
        alike = [
            run.images_per_second * known[1]
            for other, run in self.finished
            if _network(other) == _network(config) and (known := self.costs.of(other))
        ]
        if alike:
            return statistics.median(alike) / own[1], "finished jobs of the same backbone"
        scale = self.costs.work(self.reference) / self.costs.work(config)
        return self._reference_speed[0] * scale / own[1], self._reference_speed[1]

    @cached_property
    def _reference_speed(self) -> tuple[float, str]:
        if self.given is not None:
            return self.given, "speed="
        return self.measure(self.reference), "measured here"


def cheapest(configs: Iterable[Config], costs: Costs) -> Config:
    """The configuration with the backbone that is quickest to try."""
    distinct = {_key(_network(config)): config for config in configs}
    return min(distinct.values(), key=costs.work)


def checked(configs: Iterable[Mapping[str, Any]]) -> list[Config]:
    """Configurations with their initial weights left out: nothing is to be downloaded."""
    from localfeat.run.build import without_initial_weights

    return [without_initial_weights(check(dict(config))) for config in configs]

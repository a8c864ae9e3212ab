"""Plan a configuration within a memory budget: all options, the recommended one, and its command."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from localfeat.backbones.split import Split
from localfeat.efficiency.settings import Efficiency
from localfeat.memory.accounting import step_memory
from localfeat.memory.balanced_split import BalancedSplit
from localfeat.memory.emulation import Target
from localfeat.memory.fitted import fitted
from localfeat.memory.planner import Option, Planner, Workload
from localfeat.methods.base import Method
from localfeat.methods.registry import METHODS
from localfeat.run.build import build_datamodule, build_learner, build_model
from localfeat.run.configuration import RunConfiguration
from localfeat.run.construct import construct
from localfeat.run.plan.table import Plan
from localfeat.utils.errors import UserError

EFFICIENCIES = ("none", "lean", "selective", "checkpoint", "slices")
Compose = Callable[[Sequence[str]], dict[str, Any]]


def plan(
    overrides: list[str],
    compose: Compose,
    *,
    budget: int,
    margin: float,
    device: Target | None,
    options_of_hydra: Sequence[str] = (),
) -> Plan:
    """Return the plan for the configuration with ``overrides``.

    Args:
        overrides: the overrides as typed.
        compose: composes overrides to plain values.
        budget: the budget in bytes.
        margin: the share of the budget to keep free.
        device: the device to predict for; ``None`` for the CPU with ``trainer=cpu`` and CUDA otherwise.
        options_of_hydra: further options of the printed command, like ``--config-dir``.
    """
    typed = {override.lstrip("+").partition("=")[0].partition(".")[0] for override in overrides}  # also by one value
    values = compose(overrides)
    own_method = values["method"]["name"]
    if "method" not in typed:  # some configurations refuse the default method but not others
        values = compose([*overrides, "method=e2e"])
    configuration = RunConfiguration.from_values(values)
    device = device or ("cpu" if configuration.trainer.accelerator == "cpu" else "cuda")
    if (device, configuration.trainer.precision) == ("cpu", "16-mixed"):
        raise UserError("trainer.precision=16-mixed needs a GPU: use bf16-mixed")
    allowed = int(budget * (1 - margin))
    workload = workload_of(configuration, device)
    methods, efficiencies = _methods(configuration, typed), _efficiencies(configuration, typed, compose)
    planner = Planner(workload, methods, efficiencies, allowed)
    options = list(planner.options(*_split(configuration, typed, planner.blocks)))
    if "split" not in typed and "efficiency" not in typed:
        options += fitted(planner)
    # Methods differ in more than cost, so a method that was not asked for is not recommended for its cost.
    considered = [o for o in options if o.method in (own_method, "e2e")] or options
    chosen = _recommend(considered)
    if chosen is not None and not chosen.fits:
        chosen = _in_smaller_batches(considered, Planner(_accumulating(workload), methods, efficiencies, allowed))
    command = confirmed = None
    if chosen is not None:
        complete = _merged(overrides, _changes(chosen, typed, workload))
        command = shlex.join(["python", "-m", "localfeat.run", *options_of_hydra, *complete])
        confirmed = _confirmed(RunConfiguration.from_values(compose(complete)), device)
    return Plan(
        workload.batch_size,
        workload.precision,
        device,
        configuration.backbone.name,
        allowed,
        options,
        chosen,
        command,
        confirmed,
    )


def _split(configuration: RunConfiguration, typed: set[str], blocks: int) -> tuple[Split | None, int | None]:
    """Return the split that was typed, or the number of modules of a balanced one."""
    if "split" not in typed:
        return None, None
    split = configuration.split
    if not isinstance(split, BalancedSplit):
        return split, None
    split.check_blocks(blocks)
    return None, split.k


def _accumulating(workload: Workload) -> Workload:
    return replace(workload, accumulate=max(2, workload.accumulate))


def _in_smaller_batches(options: Sequence[Option], accumulating: Planner) -> Option | None:
    """Return the option with the largest batches when gradients are accumulated, evaluated exactly."""
    possible = [option for option in options if option.largest_batch]
    possible.sort(key=lambda option: (-option.largest_batch, option.step_cost))
    best: Option | None = None
    for option in possible[:3]:
        found = accumulating.exactly(option)
        if found.largest_batch and (best is None or found.largest_batch > best.largest_batch):
            best = found
    return best


def _recommend(options: Sequence[Option]) -> Option | None:
    fitting = [option for option in options if option.fits]
    if fitting:
        return min(fitting, key=lambda option: (round(option.step_cost, 3), option.modules))
    possible = [option for option in options if option.largest_batch]
    return max(possible, key=lambda option: (option.largest_batch, -option.step_cost), default=None)


def _changes(option: Option, typed: set[str], workload: Workload) -> list[str]:
    """Return the overrides for an option, in addition to those typed."""
    found = [] if "method" in typed else [f"method={option.method}"]
    # split=balanced finds the same cuts only for the same batch size and persistent memory.
    alike = option.fits and workload.accumulate == 1 and not workload.ema and workload.precision != "16-mixed"
    downsample = [] if workload.downsample == "next" else [f"split.downsample={workload.downsample}"]
    if option.balanced and option.cuts and alike:
        found += ["split=balanced", f"split.k={option.modules}", *downsample]
        found += [] if workload.target == "cuda" else [f"split.device={workload.target}"]
    elif option.cuts and (option.balanced or "split" not in typed):
        found += ["split=cuts", f"split.cuts=[{','.join(map(str, option.cuts))}]", *downsample]
    if "efficiency" not in typed:
        found += _efficiency_overrides(option)
    if not option.fits:
        windows = -(-workload.batch_size * workload.accumulate // option.largest_batch)
        found += [f"batch_size={option.largest_batch}", f"optimizer.accumulate={windows}"]
    return found


def _efficiency_overrides(option: Option) -> list[str]:
    settings = option.settings
    if option.efficiency == "slices" and settings.recompute == "none":
        found = ["efficiency=lean"]
    else:
        found = [f"efficiency={option.efficiency}"]
        if settings.blocks is not None:
            found.append(f"efficiency.blocks=[{','.join(map(str, settings.blocks))}]")
    if option.efficiency == "slices" and not settings.fused_attention:
        found.append("efficiency.fused_attention=false")
    return found


def _merged(overrides: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Return the typed overrides, with changed keys replaced."""
    changed = {change.partition("=")[0] for change in changes}

    def stays(override: str) -> bool:
        key = override.partition("=")[0]
        return key not in changed and key.lstrip("+").partition(".")[0] not in changed & {
            "method",
            "split",
            "efficiency",
        }

    return [*filter(stays, overrides), *changes]


def workload_of(configuration: RunConfiguration, device: Target) -> Workload:
    """Return a configuration's workload, without the settings that the planner chooses.

    Raises:
        UserError: the memory of a step cannot be predicted.
    """
    datamodule = build_datamodule(configuration)
    if configuration.efficiency.compile:
        raise UserError("efficiency.compile=true: the memory of a compiled step cannot be predicted; plan without it")

    def backbone() -> nn.Module:
        with torch.device("meta"):
            return build_model(configuration.without_initial_weights(), datamodule.num_classes)

    return Workload(
        backbone=backbone,
        decoder=configuration.decoder,
        batch_size=configuration.batch_size,
        target=device,
        precision=configuration.trainer.precision,
        image_size=configuration.image_size,
        source_bytes=datamodule.source.example.nbytes,
        accumulate=configuration.optimizer.accumulate,
        ema=_averages(configuration, device),
        soft_labels=configuration.dataset.mixes,
        downsample=configuration.split.downsample,
    )


def _averages(configuration: RunConfiguration, device: Target) -> bool:
    """Return whether the device holds the weights' moving average, which Lightning keeps in main memory."""
    return device == "cpu" and configuration.callbacks.ema is not None


def _methods(configuration: RunConfiguration, typed: set[str]) -> dict[str, Method]:
    if (method := configuration.method).joint and "method" in typed:
        raise UserError(f"method={method.name}: it has no cuts, so its memory is above that of e2e: plan method=e2e")
    if "method" in typed:
        return {method.name: method}
    mixes, images = configuration.dataset.mixes, configuration.batch_size
    return {
        name: method
        for name, method in METHODS.items()
        if not method.joint and not (mixes and method.contrasts) and images >= method.fewest_images
    }


def _efficiencies(configuration: RunConfiguration, typed: set[str], compose: Compose) -> dict[str, Efficiency]:
    if "efficiency" in typed:
        return {"as typed": configuration.efficiency}
    return {name: construct(compose([f"efficiency={name}"])["efficiency"], "efficiency") for name in EFFICIENCIES}


def _confirmed(configuration: RunConfiguration, device: Target) -> int:
    """Return the peak of a whole step of the configuration, by the learner's own loop on the meta device."""
    datamodule = build_datamodule(configuration)
    with torch.device("meta"):
        learner = build_learner(configuration.without_initial_weights(), datamodule.num_classes)
    return step_memory(
        learner,
        batch_size=configuration.batch_size,
        image_size=configuration.image_size,
        target=device,
        precision=configuration.trainer.precision,
        source=datamodule.source.example,
        soft_labels=configuration.dataset.mixes,
        ema=_averages(configuration, device),
    ).peak_bytes

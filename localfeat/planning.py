"""From a configuration and a budget to a plan: the options, the one to take, and the command for it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from localfeat.build import Config, build_datamodule, build_learner, build_model, check
from localfeat.config import construct
from localfeat.efficiency import Efficiency
from localfeat.errors import UserError
from localfeat.memory.accounting import step_memory
from localfeat.memory.emulation import Target
from localfeat.memory.planner import Option, Planner, Workload
from localfeat.objectives import METHODS, Method

GIB = 2**30
EFFICIENCIES = ("none", "lean", "selective", "checkpoint", "slices")
Compose = Callable[[Sequence[str]], Config]


@dataclass(frozen=True)
class Plan:
    """What was asked and what was found.

    Attributes:
        budget: bytes, the margin already taken off.
        options: everything that was evaluated.
        recommended: the cheapest that fits at the batch size wanted, else the one with the largest batch; ``None`` if
            nothing fits at any batch size.
        command: how to run it.
        confirmed_bytes: its peak by a whole step on the meta device.
    """

    batch_size: int
    precision: str
    device: Target
    backbone: str
    budget: int
    options: list[Option]
    recommended: Option | None
    command: str | None
    confirmed_bytes: int | None

    def to_json(self) -> str:
        """Everything, for programs."""
        return json.dumps(asdict(self), indent=2)

    def nothing_fits(self) -> str:
        """One line for a plan without a recommendation."""
        least = min(self.options, key=lambda option: option.peak_bytes)
        return (
            f"nothing fits into {self.budget / GIB:.2f} GiB, at no batch size; the least at batch_size="
            f"{self.batch_size} is {least.peak_bytes / GIB:.2f} GiB (method={least.method}, K={least.modules}, "
            f"efficiency={least.efficiency})"
        )

    def show(self, *, everything: bool = False) -> None:
        """Print a table, and the command."""
        console = Console(soft_wrap=True, highlight=False)
        shown = self.options if everything else _most_useful(self.options)
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in ("method", "efficiency", "K", "cuts"):
            table.add_column(name, no_wrap=True)
        for name in (f"GiB at {self.batch_size}", "fits", "most", "cost"):
            table.add_column(name, justify="right", no_wrap=True)
        for option in shown:
            table.add_row(*_cells(option), style=None if option.fits else "dim")
        console.print(
            f"{self.backbone}, {self.precision} on {self.device}, {self.budget / GIB:.2f} GiB without the margin"
        )
        console.print(table)
        console.print(
            "most: largest batch that fits; cost: estimated time of a step, plain end-to-end training is 1"
        )
        if self.command and self.recommended and self.confirmed_bytes is not None:
            if self.recommended.largest_batch < self.batch_size:
                console.print(f"nothing fits with batches of {self.batch_size}: smaller ones, accumulated")
            console.print(f"recommended ({self.confirmed_bytes / GIB:.2f} GiB):")
            console.print(f"  {self.command}", soft_wrap=True)


def _cells(option: Option) -> list[str]:
    return [
        option.method,
        _efficiency_text(option),
        str(option.modules),
        "balanced" if option.balanced and option.cuts else ",".join(map(str, option.cuts)),
        f"{option.peak_bytes / GIB:.2f}",
        "yes" if option.fits else "no",
        str(option.largest_batch) if option.largest_batch else "–",
        f"{option.step_cost:.2f}",
    ]


def _efficiency_text(option: Option) -> str:
    """The setting's name; of a search's result what it recomputes."""
    blocks = option.settings.blocks
    return option.efficiency if blocks is None and not _changed(option) else f"{len(blocks or ())} blocks recomputed"


def _changed(option: Option) -> bool:
    return option.efficiency == "slices" and option.settings.recompute == "none"


def _most_useful(options: Iterable[Option]) -> list[Option]:
    """Of every method and efficiency setting the fewest modules that fit; if none do, those with the least memory."""
    best: dict[tuple[str, str], Option] = {}
    for option in options:
        key = (option.method, _efficiency_text(option))
        known = best.get(key)
        if known is None or (not known.fits and option.peak_bytes < known.peak_bytes):
            best[key] = option
    return list(best.values())


def plan(
    config: Config, overrides: list[str], compose: Compose, *, budget: int, margin: float, device: Target | None
) -> Plan:
    """The plan for a configuration.

    Args:
        config: composed from ``overrides``.
        overrides: what was typed, for the command.
        compose: makes the configuration of other overrides.
        budget: bytes.
        margin: share of the budget that is left free.
        device: ``None`` takes the CPU for ``trainer=cpu``, else CUDA.
    """
    config = check(config)
    device = device or ("cpu" if config["trainer"]["accelerator"] == "cpu" else "cuda")
    typed = {override.partition("=")[0] for override in overrides}
    allowed = int(budget * (1 - margin))
    workload = _workload(config, device)
    planner = Planner(
        workload, _methods(config, overrides, typed, compose), _efficiencies(config, typed, compose), allowed
    )
    split = construct(config["split"], "split") if "split" in typed and "k" not in config["split"] else None
    options = list(planner.options(split))
    if "split" not in typed and "efficiency" not in typed:
        options += planner.fitted()
    if "k" in config["split"] and "split" in typed:
        options = [o for o in options if o.modules in (1, config["split"]["k"])]
    chosen = _recommend(options)
    command = confirmed = None
    if chosen is not None:
        changed = _changes(chosen, typed, workload)
        command = shlex.join(["python", "-m", "localfeat.run", *_merged(overrides, changed)])
        confirmed = _confirmed(compose(_merged(overrides, changed)), device)
    return Plan(
        workload.batch_size,
        workload.precision,
        device,
        config["backbone"]["name"],
        allowed,
        options,
        chosen,
        command,
        confirmed,
    )


def _recommend(options: Sequence[Option]) -> Option | None:
    fitting = [option for option in options if option.fits]
    if fitting:
        return min(fitting, key=lambda option: (round(option.step_cost, 3), option.modules))
    possible = [option for option in options if option.largest_batch]
    return max(possible, key=lambda option: (option.largest_batch, -option.step_cost), default=None)


def _changes(option: Option, typed: set[str], workload: Workload) -> list[str]:
    """Overrides that make the option, beside what was typed."""
    found = [f"method={option.method}"]
    if option.balanced and option.cuts:
        found += ["split=balanced", f"split.k={option.modules}"]
    elif option.cuts and "split" not in typed:
        found += ["split=cuts", f"split.cuts=[{','.join(map(str, option.cuts))}]"]
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
    """What was typed, with the changes in place of other values for the same keys."""
    changed = {change.partition("=")[0] for change in changes}
    return [*(o for o in overrides if o.partition("=")[0] not in changed), *changes]


def _workload(config: Config, device: Target) -> Workload:
    datamodule = build_datamodule(config)
    dataset, efficiency = config["dataset"], config["efficiency"]
    if efficiency.get("compile"):
        raise UserError("efficiency.compile=true: what a compiled step needs is not known; plan without it")
    height, width = datamodule.source.image_shape

    def backbone() -> nn.Module:
        with torch.device("meta"):
            initial = {**config["backbone"], "pretrained": False, "weights": None}
            return build_model({**config, "backbone": initial}, datamodule.num_classes)

    return Workload(
        backbone=backbone,
        decoder=construct(config["decoder"], "decoder"),
        batch_size=config["batch_size"],
        target=device,
        precision=config["trainer"]["precision"],
        image_size=config["image_size"],
        source_bytes=3 * height * width,
        accumulate=config["optimizer"]["accumulate"],
        ema=config["callbacks"]["ema"] is not None,
        soft_labels=bool(dataset.get("mixup") or dataset.get("cutmix")),
    )


def _methods(config: Config, overrides: list[str], typed: set[str], compose: Compose) -> dict[str, Method]:
    if "method" in typed:
        return {config["method"]["name"]: construct(config["method"], "method")}
    own = [o for o in overrides if not o.startswith("method.")]
    return {name: construct(compose([*own, f"method={name}"])["method"], "method") for name in METHODS}


def _efficiencies(config: Config, typed: set[str], compose: Compose) -> dict[str, Efficiency]:
    if "efficiency" in typed:
        return {"as typed": construct(config["efficiency"], "efficiency")}
    return {
        name: cast(Efficiency, construct(compose([f"efficiency={name}"])["efficiency"], "efficiency"))
        for name in EFFICIENCIES
    }


def _confirmed(config: Config, device: Target) -> int:
    """Peak of a whole step of the configuration, by the learner's own loop on the meta device."""
    config = check(config)
    datamodule = build_datamodule(config)
    initial = {**config["backbone"], "pretrained": False, "weights": None}
    with torch.device("meta"):
        learner = build_learner({**config, "backbone": initial}, datamodule.num_classes)
    return step_memory(
        learner,
        batch_size=config["batch_size"],
        image_size=config["image_size"],
        target=device,
        precision=config["trainer"]["precision"],
        source_shape=datamodule.source.image_shape,
        soft_labels=bool(config["dataset"].get("mixup") or config["dataset"].get("cutmix")),
        ema=config["callbacks"]["ema"] is not None,
    ).peak_bytes

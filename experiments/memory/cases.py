"""The networks that the study compares, the ways to train them, and the memory of a step of each, without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from localfeat import Efficiency
from localfeat.backbones.decompose import decompose
from localfeat.backbones.split import Downsample, Split
from localfeat.backbones.timm_models import build_backbone
from localfeat.learner.module import Learner
from localfeat.learner.optimization import Optimization
from localfeat.memory.accounting import StepMemory, step_memory
from localfeat.memory.emulation import Precision
from localfeat.run.conf_dir import conf_dir

PRECISIONS: tuple[Precision, ...] = ("32-true", "bf16-mixed")
PRECISION_NAMES = {"32-true": "fp32", "bf16-mixed": "bf16"}
CLASSES = 10


@dataclass(frozen=True)
class Network:
    """A timm model and the batch it is trained on.

    Args:
        label: name in tables and plots.
        name: timm's name.
        image_size: side in pixels of the network's input.
        batch_size: images per optimizer step.
        source: side in pixels of the uint8 source images; ``None`` means ``image_size``.
        arguments: further constructor arguments of the model, as pairs, so that networks can be keys.
    """

    label: str
    name: str
    image_size: int = 224
    batch_size: int = 128
    source: int | None = None
    drop_path_rate: float = 0.2
    arguments: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Module:
        """Build the model on torch's current default device."""
        return build_backbone(
            self.name,
            CLASSES,
            image_size=self.image_size,
            drop_path_rate=self.drop_path_rate,
            arguments=dict(self.arguments),
        )

    @property
    def source_side(self) -> int:
        """Side in pixels of the source images."""
        return self.source or self.image_size

    def stage_depths(self) -> list[int]:
        """Number of blocks per stage."""
        with torch.device("meta"):
            return list(decompose(self.build(), self.image_size).stage_depths)

    def facts(self) -> dict[str, Any]:
        """Return the network's values for the results."""
        return {
            **asdict(self),
            "arguments": dict(self.arguments),
            "source": self.source_side,
            "stage_depths": self.stage_depths(),
        }


@dataclass(frozen=True)
class Case:
    """One way to train a network.

    Args:
        cuts: numbers of the blocks after which the network is cut; empty for one module.
        accumulate: number of parts of the batch that share one optimizer step.
        downsample: to which block layers between stages belong, next or previous.
    """

    method: str
    cuts: tuple[int, ...] = ()
    efficiency: Efficiency = field(default_factory=Efficiency)
    decoder: str = "one_layer"
    accumulate: int = 1
    downsample: Downsample = "next"

    def learner(self, network: Network) -> Learner:
        """Build the learner on torch's current default device."""
        return Learner(
            network.build(),
            self.method,
            Split(cuts=self.cuts, downsample=self.downsample) if self.cuts else 1,
            self.decoder,
            optimization=Optimization(accumulate=self.accumulate),
            efficiency=self.efficiency,
        )

    def facts(self) -> dict[str, Any]:
        """Return the case's values for the results; ``key`` names the case."""
        return {
            "key": self.key,
            "method": self.method,
            "decoder": self.decoder if self.method in ("image_recon", "feature_recon") else None,
            "cuts": list(self.cuts),
            "accumulate": self.accumulate,
            "downsample": self.downsample,
            "efficiency": asdict(self.efficiency),
            "efficiency_name": described(self.efficiency),
        }

    @property
    def key(self) -> str:
        """A short text that identifies the case."""
        parts = [self.method, self.decoder, "-".join(map(str, self.cuts)) or "uncut", described(self.efficiency)]
        parts += [f"accumulate {self.accumulate}"] if self.accumulate > 1 else []
        return ", ".join([*parts, *(["downsampling first"] if self.downsample == "previous" else [])])


def memory_row(network: Network, case: Case, precision: Precision) -> dict[str, Any]:
    """Return the case with the figures, in bytes, of a whole step on a meta device that behaves like CUDA."""
    found = _step_memory(network, case, precision)
    peaks = [module.peak_bytes for module in found.modules]
    shares = asdict(found.total)
    return {**case.facts(), "peak_bytes": found.peak_bytes, **shares, "hungriest": found.hungriest, "modules": peaks}


@cache  # several parts need the same step
def _step_memory(network: Network, case: Case, precision: Precision) -> StepMemory:
    with torch.device("meta"):
        learner = case.learner(network)
    side = network.source_side
    return step_memory(
        learner,
        batch_size=network.batch_size // case.accumulate,
        image_size=network.image_size,
        target="cuda",
        precision=precision,
        source=torch.empty(3, side, side, dtype=torch.uint8, device="meta"),
        accumulate=case.accumulate,
    )


@cache
def efficiencies() -> dict[str, Efficiency]:
    """Return the settings of conf/efficiency by name, except ``compile``, whose memory cannot be counted here."""
    names = ("none", "lean", "selective", "checkpoint", "slices")
    return {name: Efficiency(**_settings(name)) for name in names}


def _settings(name: str) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "efficiency" / f"{name}.yaml"))
    inherited = {key: value for base in values.pop("defaults", []) for key, value in _settings(base).items()}
    values.pop("_target_", None)
    return {**inherited, **values}


def described(efficiency: Efficiency) -> str:
    """Return the settings' name in conf/efficiency, or say what they recompute in addition to ``lean``."""
    for name, setting in efficiencies().items():
        if efficiency == setting:
            return name
    how = efficiency.recompute if efficiency.slices == 1 else f"{efficiency.slices} slices"
    blocks = "all blocks" if efficiency.blocks is None else f"blocks {_ranges(efficiency.blocks)}"
    lean = efficiencies()["lean"]
    same = replace(efficiency, recompute="none", blocks=None, slices=1) == lean
    return f"{how} in {blocks}" if same else f"{how} in {blocks}, {efficiency.loss_slices} loss slices"


def _ranges(numbers: Sequence[int]) -> str:
    """Format numbers as ranges: ``1–4, 7``."""
    ordered, runs = sorted(numbers), list[list[int]]()
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def mixed(blocks: Sequence[int] | None, recompute: str = "checkpoint", slices: int = 8) -> Efficiency:
    """Return ``lean`` with some blocks recomputed; ``None`` means all."""
    chosen: Any = recompute
    return replace(
        efficiencies()["lean"], recompute=chosen, blocks=None if blocks is None else tuple(blocks), slices=slices
    )

"""Memory and work of any split of a network, composed from the costs of its pieces: fast enough for a search.

Exact up to a few KiB (the part ``paper`` compares); work is counted in floating-point operations of matrix products,
convolutions and attention, two per multiply-add, and in bytes read and written by all operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from experiments.memory.cases import Case, Network
from localfeat import Efficiency
from localfeat.backbones.split import Downsample
from localfeat.memory.balance import balanced_cuts
from localfeat.memory.emulation import Emulation, Precision
from localfeat.memory.module_costs import ModuleCosts, ModulePieces, Setting
from localfeat.methods.parts.decoders import as_decoder
from localfeat.methods.registry import as_method


class Total(NamedTuple):
    """Figures of a whole step: peak bytes, FLOPs, bytes read and written."""

    peak_bytes: int
    flops: float
    traffic: float

    def facts(self) -> dict[str, float]:
        """Return the figures for the results."""
        return {"flops": self.flops, "traffic": self.traffic}


@dataclass
class Composition:
    """One network in one precision; measurements are shared by all settings."""

    network: Network
    precision: Precision
    _known: dict[Downsample, dict[object, Any]] = field(default_factory=dict)
    _backbones: dict[tuple[bool, bool], nn.Module] = field(default_factory=dict)
    _costs: dict[str, ModuleCosts] = field(default_factory=dict)

    def costs(self, case: Case, batch_size: int | None = None) -> ModuleCosts:
        """Return the costs of all modules under the case's method and efficiency; its cuts are ignored."""
        size = batch_size or self.network.batch_size // case.accumulate
        key = repr((replace(case, cuts=(), accumulate=1), size))
        if key not in self._costs:
            setting = Setting(
                as_method(case.method),
                as_decoder(case.decoder),
                size,
                lambda: Emulation("cuda", self.precision),
                efficiency=case.efficiency,
                source_bytes=3 * self.network.source_side**2,
                downsample=case.downsample,
            )
            known = self._known.setdefault(case.downsample, {})
            self._costs[key] = ModuleCosts(self._backbone(case.efficiency), setting, known)
        return self._costs[key]

    def _backbone(self, efficiency: Efficiency) -> nn.Module:
        fused = efficiency.fused_attention, efficiency.fused_mlp  # these change the backbone itself
        if fused not in self._backbones:
            with torch.device("meta"):
                self._backbones[fused] = self.network.build()
        return self._backbones[fused]

    def total(self, case: Case) -> Total:
        """Return the figures of the case at the network's batch size, without accumulation."""
        if case.accumulate > 1:
            raise ValueError("gradients of all modules stay alive between accumulated batches: not composed here")
        costs = self.costs(case)
        bounds = [0, *case.cuts, costs.blocks]
        modules = [costs.module(start, stop) for start, stop in pairwise(bounds)]
        peak = costs.persistent.total + sum(s.persistent for s in modules) + max(s.peak for s in modules)
        return Total(round(peak), sum(s.flops for s in modules), sum(s.traffic for s in modules))

    def work(self, case: Case) -> Total:
        """Return ``total`` for accumulated batches too: work and peak are those of one large batch."""
        return self.total(replace(case, accumulate=1))

    def balanced(self, case: Case, modules: int) -> Case:
        """Return the case with the cuts of the lowest peak; every block is a module if there are only that many."""
        costs = self.costs(case)
        return replace(case, cuts=tuple(balanced_cuts(costs.module, costs.blocks, modules)))

    def peaks(self, case: Case, sizes: tuple[int, ...]) -> Peaks:
        """Return the peak at any batch size, from two measured sizes, or three for a quadratic term."""
        found = {size: self.costs(case, size) for size in sizes}
        some = next(iter(found.values()))
        bounds = [0, *case.cuts, some.blocks]
        pieces = [
            {size: costs.pieces_of(start, stop) for size, costs in found.items()} for start, stop in pairwise(bounds)
        ]
        return Peaks(some.persistent.total, pieces)


@dataclass(frozen=True)
class Peaks:
    """The peak of a step as a function of the batch size."""

    persistent: int
    pieces: list[dict[int, ModulePieces]]  # one dict per module: measured batch size -> its pieces

    def at(self, batch_size: int) -> float:
        """Return the peak in bytes at a batch size."""
        modules = [ModulePieces.at(batch_size, samples).combined() for samples in self.pieces]
        return self.persistent + sum(s.persistent for s in modules) + max(s.peak for s in modules)

    def largest_batch(self, budget: int) -> int:
        """Return the largest number of images whose step fits into ``budget`` bytes; 0 if one image does not."""
        low, high = 0, 1
        while self.at(high) <= budget:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.at(middle) <= budget else (low, middle)
        return low

"""Which settings of a training run fit into a memory budget, how large their batches can be, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from localfeat.backbones.split import Downsample, Split
from localfeat.efficiency.settings import Efficiency
from localfeat.memory.balance import balanced_cuts
from localfeat.memory.emulation import Emulation, Precision, Target
from localfeat.memory.module_costs import ModuleCost, ModuleCosts, ModulePieces, Setting
from localfeat.memory.persistent import Keeping
from localfeat.methods.base import Method
from localfeat.methods.parts.decoders import DecoderFactory
from localfeat.utils.errors import UserError

STEP = 8
"""Largest batches are multiples of this (below it 1, 2 and 4): slices of the batch are then of one size."""
LARGEST_BATCH = 2**16
MOST_MODULES = 12

FLOPS_PER_BYTE: Mapping[tuple[Target, Precision], float] = {
    ("cuda", "32-true"): 20.0,
    ("cuda", "bf16-mixed"): 150.0,
    ("cuda", "16-mixed"): 150.0,
    ("cpu", "32-true"): 10.0,
    ("cpu", "bf16-mixed"): 20.0,
}
"""Rough number of FLOPs that a data-centre GPU or a desktop CPU does while it moves one byte."""


def without_recomputation(efficiency: Efficiency) -> Efficiency:
    """Return the setting with the activations of every block kept."""
    return replace(efficiency, recompute="none", slices=1, blocks=None)


@dataclass(frozen=True)
class Workload:
    """A training run, without the settings that the planner chooses.

    Args:
        backbone: makes the timm model on the meta device.
        decoder: the decoder of methods that reconstruct.
        batch_size: the wanted number of images per step.
        target, precision: the device type and precision of the training.
        image_size: side in pixels, or height and width, for backbones that accept any size.
        source_bytes: bytes of one image from the loader.
        accumulate: batches per optimizer step.
        ema: whether a moving average of the weights is kept on the device.
        soft_labels: whether labels are probabilities (mixup, cutmix).
        downsample: to which block layers between stages belong, see :class:`localfeat.Split`.
    """

    backbone: Callable[[], nn.Module]
    decoder: DecoderFactory
    batch_size: int
    target: Target = "cuda"
    precision: Precision = "32-true"
    image_size: int | Sequence[int] | None = None
    source_bytes: int = 0
    accumulate: int = 1
    ema: bool = False
    soft_labels: bool = False
    downsample: Downsample = "next"


@dataclass(frozen=True)
class Option:
    """One way to train, with its memory and its cost.

    Attributes:
        method, efficiency: their names.
        settings: the efficiency settings, with the changes of the search.
        cuts: numbers of blocks after which the backbone is cut.
        peak_bytes: the predicted peak at the wanted batch size.
        fits: whether the peak is within the budget.
        largest_batch: the largest batch that fits; 0 if none does.
        step_cost: estimated time of a step relative to plain end-to-end training, from FLOPs and memory traffic.
        balanced: whether ``split=balanced`` finds these cuts.
    """

    method: str
    efficiency: str
    settings: Efficiency
    cuts: tuple[int, ...]
    peak_bytes: int
    fits: bool
    largest_batch: int
    step_cost: float
    balanced: bool

    @property
    def modules(self) -> int:
        """Number of local modules, K."""
        return len(self.cuts) + 1


class Planner:
    """Evaluate options for a workload within a budget.

    Args:
        workload: the training run.
        methods: the methods to try, by name.
        efficiencies: the efficiency settings to try, by name.
        budget: bytes that a step may take.
    """

    def __init__(
        self, workload: Workload, methods: Mapping[str, Method], efficiencies: Mapping[str, Efficiency], budget: int
    ) -> None:
        self.workload, self.methods, self.efficiencies, self.budget = workload, methods, efficiencies, budget
        self._costs: dict[object, ModuleCosts] = {}
        self._known: dict[object, Any] = {}
        self._backbones: dict[tuple[bool, bool], nn.Module] = {}  # fusing changes the backbone
        self.blocks = self._plain(workload.batch_size).blocks

    def options(self, split: Split | None = None, modules: int | None = None) -> Iterator[Option]:
        """Yield every method with every efficiency setting, cut by ``split`` or balanced (K = 1 to 12, or ``modules``).

        One module is the whole network under the classifier's cross entropy: end-to-end training for any method.
        """
        for name, method in self.methods.items():
            for efficiency in self.possible(name):
                for cuts, balanced in self._divisions(name, efficiency, split, modules):
                    if method.local == bool(cuts):
                        yield self.option(name, efficiency, cuts, balanced=balanced)

    def possible(self, method: str) -> list[str]:
        """Return the efficiency settings that work with this backbone and the method's decoder.

        Raises:
            UserError: no setting works with them, and it is the only method.
        """
        found, refusal = [], None
        for name, settings in self.efficiencies.items():
            try:
                first = 1 if self.methods[method].local else self.blocks
                self.costs(method, settings, self.workload.batch_size).module(0, first)
                found.append(name)
            except UserError as error:
                refusal = error
        if not found and refusal is not None and len(self.methods) == 1:
            raise refusal
        return found

    def _divisions(
        self, method: str, efficiency: str, split: Split | None, only: int | None
    ) -> Iterator[tuple[tuple[int, ...], bool]]:
        costs = self.costs(method, self.efficiencies[efficiency], self.workload.batch_size)
        if not self.methods[method].local:
            yield (), split is None
        elif split is not None:
            lengths = split.blocks_per_module(costs.pieces.stage_depths)
            yield tuple(sum(lengths[: i + 1]) for i in range(len(lengths) - 1)), False
        else:
            for modules in [only] if only else range(2, min(MOST_MODULES, self.blocks) + 1):
                yield tuple(balanced_cuts(costs.module, self.blocks, modules)), True

    def option(
        self,
        method: str,
        efficiency: str,
        cuts: tuple[int, ...],
        *,
        balanced: bool,
        blocks: tuple[int, ...] | None = None,
        fused: bool | None = None,
    ) -> Option:
        """Evaluate one way to train; ``blocks`` and ``fused`` change the efficiency setting."""
        settings = self.efficiencies[efficiency]
        if fused is not None:
            settings = replace(settings, fused_attention=fused)
        if blocks is not None:
            settings = replace(settings, blocks=blocks) if blocks else without_recomputation(settings)
        peak, cost = self.evaluate(method, settings, cuts)
        fits = peak <= self.budget
        largest = self._largest_batch(method, settings, cuts)
        return Option(method, efficiency, settings, cuts, round(peak), fits, largest, cost, balanced)

    def evaluate(self, method: str, efficiency: Efficiency, cuts: Sequence[int]) -> tuple[float, float]:
        """Return the peak in bytes and the step cost at the wanted batch size."""
        costs = self.costs(method, efficiency, self.workload.batch_size)
        modules = [costs.module(*edges) for edges in pairwise([0, *cuts, self.blocks])]
        return self.peak(modules), self.step_cost(modules)

    def peak(self, modules: Sequence[ModuleCost]) -> float:
        """Return the peak of a step of these modules in bytes."""
        return self.persistent + sum(s.persistent for s in modules) + max(s.peak for s in modules)

    @property
    def persistent(self) -> float:
        """Persistent bytes of the backbone: weights, optimizer states, and gradients under accumulation."""
        return self._plain(self.workload.batch_size).persistent.total

    def step_cost(self, modules: Iterable[ModuleCost]) -> float:
        """Return the cost of a step relative to plain end-to-end training."""
        whole = self._plain(self.workload.batch_size).module(0, self.blocks)
        return sum(map(self.work, modules)) / self.work(whole)

    def work(self, module: ModuleCost) -> float:
        """Return the work of a module in bytes moved, FLOPs converted to bytes."""
        return module.flops / FLOPS_PER_BYTE[self.workload.target, self.workload.precision] + module.traffic

    def _largest_batch(self, method: str, efficiency: Efficiency, cuts: tuple[int, ...]) -> int:
        """Return the largest multiple of ``STEP`` that fits, from measurements at three sizes, or 4, 2, 1 or 0."""
        edges = list(pairwise([0, *cuts, self.blocks]))
        sizes = self._probes()
        samples = {size: self.costs(method, efficiency, size) for size in sizes}
        pieces = [{size: samples[size].pieces_of(*edge, body=size != sizes[-1]) for size in sizes} for edge in edges]

        def fits(batch: int) -> bool:
            return self.peak([ModulePieces.at(batch, sample).combined() for sample in pieces]) <= self.budget

        if fits(STEP):
            low, high = 1, 2
            while high * STEP <= LARGEST_BATCH and fits(high * STEP):
                low, high = high, 2 * high
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle * STEP) else (low, middle)
            return low * STEP
        return self._few(method, efficiency, edges)

    def _few(self, method: str, efficiency: Efficiency, edges: Sequence[tuple[int, int]]) -> int:
        """Return the largest batch below ``STEP`` that fits; 0 if none does."""
        for batch in (4, 2, 1):
            costs = self.costs(method, efficiency, batch)
            if (
                batch >= self.methods[method].fewest_images
                and self.peak([costs.module(*edge) for edge in edges]) <= self.budget
            ):
                return batch
        return 0

    def exactly(self, option: Option) -> Option:
        """Return the option with its largest batch measured at that size, not interpolated from other sizes."""
        edges = list(pairwise([0, *option.cuts, self.blocks]))

        def fits(steps: int) -> bool:
            costs = self.costs(option.method, option.settings, steps * STEP)
            return self.peak([costs.module(*edge) for edge in edges]) <= self.budget

        if option.largest_batch < STEP:
            return option
        low = high = option.largest_batch // STEP  # low fits or is 0, high does not fit
        stride = 1
        if fits(low):
            high = low + stride
            while high * STEP <= LARGEST_BATCH and fits(high):
                low, stride = high, 2 * stride
                high = low + stride
        else:
            low = max(0, high - stride)
            while low and not fits(low):
                high, stride = low, 2 * stride
                low = max(0, high - stride)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return replace(option, largest_batch=low * STEP or self._few(option.method, option.settings, edges))

    def _probes(self) -> list[int]:
        middle = max(2 * STEP, self.workload.batch_size // STEP * STEP)
        return [middle // (2 * STEP) * STEP, middle, 2 * middle]

    def _plain(self, batch_size: int) -> ModuleCosts:
        return self.costs(next(iter(self.methods)), Efficiency(), batch_size)

    def costs(self, method: str, efficiency: Efficiency, batch_size: int) -> ModuleCosts:
        """Return the measured costs, cached."""
        key = (method, repr(efficiency), batch_size)
        if key not in self._costs:
            work = self.workload
            setting = Setting(
                self.methods[method],
                work.decoder,
                batch_size,
                lambda: Emulation(work.target, work.precision),
                efficiency,
                work.image_size,
                work.source_bytes,
                work.soft_labels,
                Keeping((work.target, work.precision) != ("cuda", "16-mixed"), work.accumulate > 1, work.ema),
                work.downsample,
            )
            fused = efficiency.fused_attention, efficiency.fused_mlp
            if fused not in self._backbones:
                self._backbones[fused] = work.backbone()
            self._costs[key] = ModuleCosts(self._backbones[fused], setting, self._known)
        return self._costs[key]

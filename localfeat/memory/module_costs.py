"""The cost of every local module that could be cut out of a backbone, from the costs of its pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from localfeat.backbones.decompose import Decomposition
from localfeat.backbones.split import Downsample
from localfeat.efficiency.settings import Efficiency
from localfeat.learner.assembly import build_objective, cut_for, prepare_blocks, site_of
from localfeat.memory.costs import PieceCost, measure_objective, measure_piece, signature
from localfeat.memory.persistent import Keeping, Persistent
from localfeat.memory.pieces import ModuleCost, ModulePieces
from localfeat.memory.tracker import rounded
from localfeat.methods.base import Method
from localfeat.methods.local_module import weighted_sum
from localfeat.methods.objective import Objective
from localfeat.methods.parts.decoders import DecoderFactory

Device = Callable[[], AbstractContextManager[Any]]
"""Makes a context in which meta tensors behave like those of a device (autocast, attention kernels)."""


@dataclass(frozen=True)
class Setting:
    """Everything that costs depend on, apart from the backbone and the cuts.

    Args:
        method, decoder: the method and its decoder.
        batch_size: images per step.
        device: see :data:`Device`.
        efficiency: how blocks and losses are computed.
        image_size: side in pixels, or height and width, for backbones that accept any size.
        source_bytes: bytes of one image from the loader, alive for the whole step; 0 if the loader yields the images
            that the network reads.
        soft_labels: whether labels are probabilities (mixup, cutmix).
        keeping: which tensors are persistent.
        downsample: to which block layers between stages belong.
    """

    method: Method
    decoder: DecoderFactory
    batch_size: int
    device: Device
    efficiency: Efficiency = field(default_factory=Efficiency)
    image_size: int | Sequence[int] | None = None
    source_bytes: int = 0
    soft_labels: bool = False
    keeping: Keeping = field(default_factory=Keeping)
    downsample: Downsample = "next"


class _Objective(NamedTuple):
    cost: PieceCost
    persistent: int  # bytes, without those of the backbone
    scratch: int
    uses_images: bool
    watches: bool  # whether it watches the blocks


class ModuleCosts:
    """Measure the pieces of a backbone and add them up to local modules.

    The cost of an objective is assumed to depend on the blocks of its module and those above, not on the number of
    modules: it is measured as the first module's. An objective that watches blocks is measured with each of them.

    Args:
        backbone: a model on the meta device, or its parts; changed in place if attention or MLPs are fused.
        setting: everything else that costs depend on.
        known: measurements of other instances with the same backbone, image size, downsampling and device, to share.
    """

    def __init__(
        self, backbone: nn.Module | Decomposition, setting: Setting, known: dict[object, Any] | None = None
    ) -> None:
        self.setting = setting
        self._shared = {} if known is None else known
        self.pieces: Decomposition = self._once(("pieces", id(backbone)), lambda: self._cut(backbone))
        self.backbone = self.pieces.model.train()
        self.runners = prepare_blocks(self.backbone, self.pieces.train(), setting.efficiency)
        self._modules: dict[tuple[int, int], ModuleCost] = {}

    def _cut(self, backbone: nn.Module | Decomposition) -> Decomposition:
        if isinstance(backbone, Decomposition):
            return backbone
        return cut_for(backbone, self.setting.image_size, self.setting.downsample)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.pieces.blocks)

    @cached_property
    def persistent(self) -> Persistent:
        """Persistent bytes of the backbone."""
        return Persistent.of(self.backbone, self.setting.keeping)

    @cached_property
    def features(self) -> list[Tensor]:
        """Meta tensors: ``features[i]`` is the input of block i, the last one that of the classifier."""
        return cast("list[Tensor]", self._once(("features", self.setting.batch_size), self._features))

    def _features(self) -> list[Tensor]:
        with torch.no_grad(), self.setting.device():
            x = self.pieces.stem(self._images())
            found = [x]
            for block in self.pieces.blocks:
                x = block(x)
                found.append(x)
        return [torch.empty(x.shape, dtype=x.dtype, device="meta") for x in found]

    def module(self, start: int, stop: int) -> ModuleCost:
        """Return the cost of the module of blocks ``start`` to ``stop`` (exclusive)."""
        if (start, stop) not in self._modules:
            self._modules[start, stop] = self.pieces_of(start, stop).combined()
        return self._modules[start, stop]

    def pieces_of(self, start: int, stop: int, *, body: bool = True) -> ModulePieces:
        """Return the pieces of the module of blocks ``start`` to ``stop`` (exclusive), its chain only if ``body``."""
        objective, last = self._objective(start, stop), stop == self.blocks
        watched = last if objective.watches else None
        blocks = range(start, stop) if body else ()
        chain = [self._block(index, first=index == start > 0, watched=watched) for index in blocks]
        if body and start == 0:
            chain.insert(0, self._stem())
        images, inputs = rounded(self._images().nbytes), rounded(self.features[start].nbytes)
        held = images if start == 0 else inputs + images * objective.uses_images
        outputs = rounded(self.features[stop].nbytes)
        return ModulePieces(
            start,
            stop,
            chain,
            objective.cost,
            objective.persistent,
            self._batch_bytes + held,
            outputs,
            self._batch_bytes + images * objective.uses_images,
            max(objective.scratch, self._scratch(start, stop)),
            self.setting.keeping.accumulates,
        )

    def _scratch(self, start: int, stop: int) -> int:
        stem = [self.pieces.stem] if start == 0 else []
        return self.setting.keeping.scratch([*stem, *self.pieces.blocks[start:stop]])

    @property
    def _batch_bytes(self) -> int:
        """Bytes of source images and labels, which the Trainer holds for the whole step."""
        size = self.setting.batch_size
        return rounded(self.setting.source_bytes * size) + rounded(self._labels().nbytes)

    def _images(self) -> Tensor:
        return torch.empty(self.setting.batch_size, *self.pieces.image, device="meta")

    def _labels(self) -> Tensor:
        if self.setting.soft_labels:
            return torch.empty(self.setting.batch_size, self.pieces.num_classes, device="meta")
        return torch.empty(self.setting.batch_size, dtype=torch.int64, device="meta")

    def _stem(self) -> PieceCost:
        stem, setting = self.pieces.stem, self.setting

        def measure() -> PieceCost:
            return measure_piece(stem, self._images, stem, setting.device(), first=True)

        return cast(PieceCost, self._once(("stem", setting.batch_size), measure))

    def _block(self, index: int, *, first: bool, watched: bool | None) -> PieceCost:
        """Measure a block, watched by the last module's objective (True), an earlier one's (False) or none (None)."""
        block, run, x = self.pieces.blocks[index], self.runners[index], self.features[index]
        efficiency = self.setting.efficiency
        recomputed = efficiency.recompute if efficiency.recomputes(index) else "none"
        how = (recomputed, efficiency.slices, efficiency.fused_attention, efficiency.fused_mlp)

        def measure() -> PieceCost:
            return measure_piece(
                lambda features: run(block, features),
                lambda: torch.empty_like(x),
                block,
                self.setting.device(),
                first=first,
                objective=None if watched is None else self._built(index, index + 1, last=watched),
            )

        key: tuple[object, ...] = ("block", signature(block), tuple(x.shape), x.dtype, how, first)
        key += () if watched is None else (repr(self.setting.method), watched)
        return cast(PieceCost, self._once(key, measure))

    def _built(self, start: int, stop: int, *, last: bool) -> Objective:
        """Build the objective of the module of these blocks on meta."""
        site = site_of(
            self.pieces,
            (start, stop),
            index=1 if last else 0,
            modules=2,
            efficiency=self.setting.efficiency,
        )
        with torch.random.fork_rng(devices=[]):  # the initial weights are never used
            objective = build_objective(self.setting.method, site, self.setting.decoder)
        return objective.to("meta").train()

    def _objective(self, start: int, stop: int) -> _Objective:
        last = stop == self.blocks
        setting, inputs, outputs = self.setting, self.features[start], self.features[stop]
        key: list[object] = ["objective", setting.method, setting.decoder, setting.efficiency.loss_slices]
        key += [setting.soft_labels, setting.keeping, tuple(outputs.shape), outputs.dtype]
        key += ["classifier"] if last else [tuple(inputs.shape), inputs.dtype]
        key += [] if setting.method.by_shapes else [start, stop]
        return cast(_Objective, self._once(_hashable(key), lambda: self._measure(start, stop)))

    def _measure(self, start: int, stop: int) -> _Objective:
        last = stop == self.blocks
        objective = self._built(start, stop, last=last)
        inputs, images = torch.empty_like(self.features[start]), self._images()
        labels = self._labels()

        def loss(outputs: Tensor) -> Tensor:
            terms, _ = objective(inputs, outputs, images, labels)
            return weighted_sum(terms, objective.weights)

        outputs = torch.empty_like(self.features[stop])
        weights = [*self.backbone.parameters(), *self.backbone.buffers()]  # some objectives read other modules'
        cost = measure_objective(loss, outputs, objective, [inputs, images, labels, *weights], self.setting.device())
        keeping = self.setting.keeping
        persistent = 0 if last else Persistent.of(objective, keeping).total  # the classifier is the backbone's
        return _Objective(
            cost, persistent, keeping.scratch([objective]), objective.uses_images, objective.watched is not None
        )

    def _once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


def _hashable(values: list[object]) -> tuple[object, ...]:
    """Return a hashable key: methods and decoders may hold lists, so they are compared by their text."""
    return tuple(repr(value) for value in values)

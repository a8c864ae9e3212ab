"""The peak of every module that could be cut out of a backbone, from the costs of its pieces."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from localfeat.backbones.decompose import Decomposition, decompose
from localfeat.backbones.timm_models import image_size_of
from localfeat.efficiency.settings import Efficiency
from localfeat.learner.assembly import build_objective, prepare_blocks, site_of
from localfeat.memory.costs import PieceCost, measure_objective, measure_piece, signature
from localfeat.memory.parts import Parts, Segment
from localfeat.memory.standing import Keeping, Standing
from localfeat.memory.tracker import rounded
from localfeat.methods.base import Method
from localfeat.methods.local_module import weighted_sum
from localfeat.methods.objective import Objective
from localfeat.methods.parts.decoders import DecoderFactory

Device = Callable[[], AbstractContextManager[Any]]
"""Makes the context in which meta tensors behave as a device's do (autocast, attention kernels)."""


@dataclass(frozen=True)
class Setting:
    """What the costs depend on, apart from the backbone and the cuts.

    Args:
        method, decoder: what modules learn from.
        batch_size: images per step.
        device: see :data:`Device`.
        efficiency: how blocks and losses are computed.
        image_size: where the backbone does not fix it.
        source_bytes: bytes of one image as it arrives from the loader and stays all step; 0 if the images arrive as
            the network takes them.
        soft_labels: whether labels are probabilities (mixup, cutmix).
        keeping: what stands between steps.
    """

    method: Method
    decoder: DecoderFactory
    batch_size: int
    device: Device
    efficiency: Efficiency = field(default_factory=Efficiency)
    image_size: int | None = None
    source_bytes: int = 0
    soft_labels: bool = False
    keeping: Keeping = field(default_factory=Keeping)


class _Objective(NamedTuple):
    cost: PieceCost
    standing: int  # of what is not the backbone's
    scratch: int
    uses_images: bool
    watches: bool  # the blocks


class SegmentCosts:
    """Measures the pieces of a backbone and adds them up to modules.

    It assumes that what an objective costs depends on the blocks of its module and those above, not on the number of
    modules: it is measured as the first module's. What watches blocks is measured with each of them.

    Args:
        backbone: a timm model on the meta device; it is changed if attention or MLPs are to be fused.
        setting: the rest.
        known: measurements of other instances with the same backbone, image size and device, to share.
    """

    def __init__(self, backbone: nn.Module, setting: Setting, known: dict[object, Any] | None = None) -> None:
        self.setting = setting
        self.backbone = backbone.train()
        self.size = image_size_of(backbone, setting.image_size)
        self._shared = {} if known is None else known
        self.pieces: Decomposition = self._once(("pieces", id(backbone)), lambda: decompose(backbone, self.size))
        self.runners = prepare_blocks(backbone, self.pieces, setting.efficiency)
        self._segments: dict[tuple[int, int], Segment] = {}

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.pieces.blocks)

    @cached_property
    def standing(self) -> Standing:
        """Of the backbone."""
        return Standing.of(self.backbone, self.setting.keeping)

    @cached_property
    def features(self) -> list[Tensor]:
        """``features[i]``: input of block i; the last one: of the classifier. On meta."""
        return cast("list[Tensor]", self._once(("features", self.setting.batch_size), self._features))

    def _features(self) -> list[Tensor]:
        with torch.no_grad(), self.setting.device():
            x = self.pieces.stem(self._images())
            found = [x]
            for block in self.pieces.blocks:
                x = block(x)
                found.append(x)
        return [torch.empty(x.shape, dtype=x.dtype, device="meta") for x in found]

    def segment(self, start: int, stop: int) -> Segment:
        """The module of blocks ``start`` to ``stop`` (exclusive)."""
        if (start, stop) not in self._segments:
            self._segments[start, stop] = self.parts(start, stop).combined()
        return self._segments[start, stop]

    def parts(self, start: int, stop: int, *, body: bool = True) -> Parts:
        """What the module of blocks ``start`` to ``stop`` (exclusive) is made of; without its body if so wanted."""
        objective, last = self._objective(start, stop), stop == self.blocks
        watched = last if objective.watches else None
        blocks = range(start, stop) if body else ()
        chain = [self._block(index, first=index == start > 0, watched=watched) for index in blocks]
        if body and start == 0:
            chain.insert(0, self._stem())
        images, inputs = rounded(self._images().nbytes), rounded(self.features[start].nbytes)
        held = images if start == 0 else inputs + images * objective.uses_images
        outputs = rounded(self.features[stop].nbytes)
        return Parts(
            start,
            stop,
            chain,
            objective.cost,
            objective.standing,
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
        """Source images and labels, which the Trainer holds all step."""
        size = self.setting.batch_size
        return rounded(self.setting.source_bytes * size) + rounded(self._labels().nbytes)

    def _images(self) -> Tensor:
        return torch.empty(self.setting.batch_size, 3, self.size, self.size, device="meta")

    def _labels(self) -> Tensor:
        if self.setting.soft_labels:
            return torch.empty(self.setting.batch_size, cast(int, self.backbone.num_classes), device="meta")
        return torch.empty(self.setting.batch_size, dtype=torch.int64, device="meta")

    def _stem(self) -> PieceCost:
        stem, setting = self.pieces.stem, self.setting

        def measure() -> PieceCost:
            return measure_piece(stem, self._images, stem, setting.device(), first=True)

        return cast(PieceCost, self._once(("stem", setting.batch_size), measure))

    def _block(self, index: int, *, first: bool, watched: bool | None) -> PieceCost:
        """Of a block; watched by an objective, the last module's (True) or one before it (False), or not (None)."""
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
        """The objective of a module of these blocks, on meta."""
        site = site_of(
            self.pieces,
            (start, stop),
            index=1 if last else 0,
            modules=2,
            image_size=self.size,
            num_classes=cast(int, self.backbone.num_classes),
            efficiency=self.setting.efficiency,
        )
        with torch.random.fork_rng(devices=[]):  # initial weights that nothing is trained from
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
        cost = measure_objective(loss, outputs, objective, [inputs, images, labels], self.setting.device())
        keeping = self.setting.keeping
        standing = 0 if last else Standing.of(objective, keeping).total  # the classifier is the backbone's
        return _Objective(
            cost, standing, keeping.scratch([objective]), objective.uses_images, objective.watched is not None
        )

    def _once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


def _hashable(values: list[object]) -> tuple[object, ...]:
    """Methods and decoders may hold lists; their text tells equal ones."""
    return tuple(repr(value) for value in values)

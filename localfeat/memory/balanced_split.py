"""The split that costs the least memory, for any backbone and method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from localfeat.backbones.bare import without_data
from localfeat.backbones.split import Downsample, Split, check_downsample
from localfeat.efficiency.settings import Efficiency
from localfeat.memory.balance import balanced_cuts
from localfeat.memory.emulation import AUTOCAST_DTYPES, Emulation, Precision, Target
from localfeat.memory.module_costs import ModuleCosts, Setting
from localfeat.memory.persistent import Keeping
from localfeat.methods.base import Method
from localfeat.methods.parts.decoders import DecoderFactory
from localfeat.utils.errors import UserError


@dataclass(frozen=True)
class BalancedSplit:
    """``k`` local modules, cut where the peak memory of a training step is lowest.

    The cuts are exact for the costs measured on the meta device (:mod:`localfeat.memory.module_costs`).

    Args:
        k: number of local modules.
        batch_size: images per step.
        precision: the training's precision, as in Lightning.
        device: type of the device whose memory counts; any machine finds the same cuts.
        downsample: see :class:`Split`.
    """

    k: int = 4
    batch_size: int = 128
    precision: Precision = "32-true"
    device: Target = "cuda"
    downsample: Downsample = "next"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"split.k={self.k}: a network has at least 1 local module")
        if self.batch_size < 1:
            raise UserError(f"split.batch_size={self.batch_size}: it must be at least 1")
        for key, known in (("precision", tuple(AUTOCAST_DTYPES)), ("device", ("cuda", "cpu"))):
            if getattr(self, key) not in known:
                raise UserError(f"split.{key}={getattr(self, key)}: it is one of {', '.join(known)}")
        check_downsample(self.downsample)

    def resolve(
        self,
        backbone: nn.Module,
        method: Method,
        decoder: DecoderFactory,
        *,
        image_size: int | Sequence[int] | None = None,
        efficiency: Efficiency | None = None,
    ) -> Split:
        """Return the cuts for a backbone (on any device, left unchanged), a method and a decoder.

        Raises:
            UserError: more modules than blocks, or a compiled step, whose memory cannot be predicted.
        """
        efficiency = efficiency or Efficiency()
        if efficiency.compile:
            raise UserError("split=balanced: what a compiled step needs is not known: leave out efficiency.compile")
        precision = "bf16-mixed" if (self.device, self.precision) == ("cpu", "16-mixed") else self.precision
        setting = Setting(
            method,
            decoder,
            self.batch_size,
            lambda: Emulation(self.device, precision),
            efficiency=efficiency,
            image_size=image_size,
            keeping=Keeping(fused_optimizer=(self.device, self.precision) != ("cuda", "16-mixed")),
            downsample=self.downsample,
        )
        costs = ModuleCosts(without_data(backbone), setting)
        self.check_blocks(costs.blocks)
        if not method.local:
            return Split(1, by="blocks", downsample=self.downsample)
        return Split(cuts=tuple(balanced_cuts(costs.module, costs.blocks, self.k)), downsample=self.downsample)

    def check_blocks(self, blocks: int) -> None:
        """Refuse a backbone with too few blocks.

        Raises:
            UserError: more modules than blocks.
        """
        if self.k > blocks:
            raise UserError(f"split.k={self.k}: this backbone has {blocks} blocks, which is the most modules")

"""One run's configuration as a typed object: checked once, when built from plain values, and trusted afterwards."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from localfeat.backbones.split import Split
from localfeat.backbones.timm_models import normalisation_of_model
from localfeat.efficiency.settings import Efficiency
from localfeat.learner.optimization import Optimization
from localfeat.memory.balanced_split import BalancedSplit
from localfeat.methods.base import Method
from localfeat.methods.parts.decoders import DecoderFactory
from localfeat.run.composition import with_home
from localfeat.run.construct import check_values, construct, target_and_values, typed
from localfeat.run.settings import (
    BackboneSettings,
    CallbackSettings,
    DatasetSettings,
    Part,
    PlainSettings,
    TrainerSettings,
)
from localfeat.utils.errors import UserError

_GROUPS = (
    "backbone",
    "dataset",
    "split",
    "decoder",
    "method",
    "optimizer",
    "efficiency",
    "trainer",
    "callbacks",
    "logger",
)

OF_RUN = ("image_size", "in_chans", "batch_size", "seed")
"""Arguments of the datamodule that are settings of the run."""


@dataclass(frozen=True, kw_only=True)
class RunConfiguration(PlainSettings):
    """All settings of a run: those of `PlainSettings`, and the groups that name parts of localfeat.

    Args:
        backbone, dataset, split, decoder, method, optimizer, efficiency: the configuration groups of the same name, as
            objects.
        logger: the logger used in addition to ``metrics.csv``; ``None`` for none.
        values: the same configuration as plain values, as in ``config.yaml``.

    Raises:
        UserError: values out of range or combined wrongly. Checks that need the data, the backbone or the device are
            made when those are built.
    """

    backbone: BackboneSettings
    dataset: DatasetSettings
    split: Split | BalancedSplit
    decoder: DecoderFactory
    method: Method
    optimizer: Optimization
    efficiency: Efficiency = field(default_factory=Efficiency)
    logger: Part | None = None
    values: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> RunConfiguration:
        """Return the configuration for plain values, composed by Hydra or read from a ``config.yaml``.

        Raises:
            UserError: unknown keys; values of the wrong type, out of range or combined wrongly.
        """
        values, hints = with_home(values), typing.get_type_hints(cls)
        known = {
            item.name: dict[str, Any] if item.name in _GROUPS else hints[item.name]
            for item in dataclasses.fields(cls)
            if item.name != "values"
        }
        required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        checked = check_values(values, known, required, "")
        groups = {name: _GROUP_MAKERS.get(name, construct)(checked[name], name) for name in _GROUPS if name in checked}
        typed_groups = [name for name in ("trainer", "callbacks") if name in groups]
        plain: dict[str, Any] = {n: {key: getattr(groups[n], key) for key in checked[n]} for n in typed_groups}
        return cls(**{**checked, **groups}, values={**checked, **plain})

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in OF_RUN:
            own = self.dataset.values.get(key, getattr(self, key))
            if (tuple(own) if isinstance(own, list) else own) != getattr(self, key):
                raise UserError(f"dataset.{key}={own} differs from {key}={getattr(self, key)}: set only {key}")
        name, fewest = self.method.name, self.method.fewest_images
        if self.method.contrasts and self.dataset.mixes:
            raise UserError(
                f"method={name} contrasts images by their class, which mixup and cutmix blur: "
                "set dataset.mixup=0 dataset.cutmix=0, or method.supervision=cross_entropy"
            )
        if self.batch_size < fewest:
            raise UserError(f"batch_size={self.batch_size}: method={name} compares images, at least {fewest} of them")

    @property
    def model_name(self) -> str:
        """The name of the timm model that is trained."""
        return self.backbone.model_name(self.image_size)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of every channel, for pixels in [0, 1]: the dataset's, else the backbone's."""
        expected = normalisation_of_model(self.model_name, self.in_chans, self.backbone.arguments)
        own = (self.dataset.values.get("mean"), self.dataset.values.get("std"))
        mean, std = (tuple(own) if own else of_model for own, of_model in zip(own, expected, strict=True))
        return mean, std

    @property
    def backbone_label(self) -> str:
        """The backbone's name in results."""
        return self.backbone.label or self.model_name

    @property
    def decoder_name(self) -> str:
        """The name of the decoders' class."""
        return str(getattr(self.decoder, "func", self.decoder).__name__)

    def without_initial_weights(self) -> RunConfiguration:
        """Return a copy whose backbone loads no initial weights, because they are loaded later or not needed."""
        return replace(self, backbone=replace(self.backbone, pretrained=False, weights=None))

    def with_root(self, root: str | Path) -> RunConfiguration:
        """Return a copy with the dataset's files in another folder."""
        return replace(self, dataset=replace(self.dataset, values={**self.dataset.values, "root": str(root)}))

    def with_cuts(self, cuts: Sequence[int]) -> RunConfiguration:
        """Return a copy cut after these numbers of blocks, so that the cuts are not searched for again."""
        split = Split(cuts=tuple(cuts), downsample=self.split.downsample)
        own = {"_target_": "localfeat.Split", "cuts": list(cuts), "downsample": split.downsample}
        return replace(self, split=split, values={**self.values, "split": own})


def _logger(values: Mapping[str, Any], key: str) -> Part | None:
    return Part(*target_and_values(dict(values), key, ("save_dir",))) if values else None


_GROUP_MAKERS: dict[str, Any] = {
    "backbone": lambda values, key: typed(BackboneSettings, values, key),
    "dataset": lambda values, key: DatasetSettings(*target_and_values(values, key)),
    "trainer": lambda values, key: typed(TrainerSettings, values, key),
    "callbacks": lambda values, key: typed(CallbackSettings, values, key),
    "logger": _logger,
}

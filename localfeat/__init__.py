"""Train vision transformers module by module, each by its own local loss.

    learner = localfeat.Learner(timm_model, method="feature_recon", split=4)
    lightning.Trainer(max_epochs=10).fit(learner, train_loader, val_loader)

The names below are loaded when first used: ``import localfeat`` itself imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localfeat.backbones.decompose import Decomposition, decompose
    from localfeat.backbones.split import Split
    from localfeat.data.datamodule import ImageDataModule
    from localfeat.efficiency.settings import Efficiency
    from localfeat.learner.module import Learner
    from localfeat.learner.optimization import Optimization
    from localfeat.memory.accounting import step_memory
    from localfeat.memory.balanced_split import BalancedSplit
    from localfeat.methods.base import Method
    from localfeat.methods.head_and_decoder import HeadAndDecoder
    from localfeat.methods.objective import Objective
    from localfeat.methods.parts.decoders import DeconvDecoder, InterpDecoder, OneLayerDecoder
    from localfeat.methods.registry import METHODS
    from localfeat.methods.site import Site
    from localfeat.methods.supervised import Supervised
    from localfeat.run.callbacks.nonfinite import StopOnNonFinite
    from localfeat.run.library import compose, train
    from localfeat.utils.errors import RunFailed, Stopped, UserError

__version__ = "0.1.0"

_HOMES = {
    "BalancedSplit": "localfeat.memory.balanced_split",
    "Decomposition": "localfeat.backbones.decompose",
    "DeconvDecoder": "localfeat.methods.parts.decoders",
    "Efficiency": "localfeat.efficiency.settings",
    "HeadAndDecoder": "localfeat.methods.head_and_decoder",
    "ImageDataModule": "localfeat.data.datamodule",
    "InterpDecoder": "localfeat.methods.parts.decoders",
    "Learner": "localfeat.learner.module",
    "METHODS": "localfeat.methods.registry",
    "Method": "localfeat.methods.base",
    "Objective": "localfeat.methods.objective",
    "OneLayerDecoder": "localfeat.methods.parts.decoders",
    "Optimization": "localfeat.learner.optimization",
    "RunFailed": "localfeat.utils.errors",
    "Site": "localfeat.methods.site",
    "Split": "localfeat.backbones.split",
    "StopOnNonFinite": "localfeat.run.callbacks.nonfinite",
    "Stopped": "localfeat.utils.errors",
    "Supervised": "localfeat.methods.supervised",
    "UserError": "localfeat.utils.errors",
    "compose": "localfeat.run.library",
    "decompose": "localfeat.backbones.decompose",
    "step_memory": "localfeat.memory.accounting",
    "train": "localfeat.run.library",
}
__all__ = [
    "METHODS",
    "BalancedSplit",
    "Decomposition",
    "DeconvDecoder",
    "Efficiency",
    "HeadAndDecoder",
    "ImageDataModule",
    "InterpDecoder",
    "Learner",
    "Method",
    "Objective",
    "OneLayerDecoder",
    "Optimization",
    "RunFailed",
    "Site",
    "Split",
    "StopOnNonFinite",
    "Stopped",
    "Supervised",
    "UserError",
    "compose",
    "decompose",
    "step_memory",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'localfeat' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""Train vision transformers module by module, each by its own local loss.

    learner = localfeat.Learner(timm_model, method="feature_recon", split=4)
    lightning.Trainer(max_epochs=10).fit(learner, train_loader, val_loader)

The names below are loaded when first used: ``import localfeat`` itself imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localfeat.data import ImageDataModule
    from localfeat.efficiency import Efficiency
    from localfeat.errors import UserError
    from localfeat.learner import Learner
    from localfeat.memory.accounting import step_memory
    from localfeat.memory.balanced_split import BalancedSplit
    from localfeat.network import Split
    from localfeat.objectives import METHODS, Method, Objective, Site
    from localfeat.optimization import Optimization

__version__ = "0.1.0"

_HOMES = {
    "BalancedSplit": "localfeat.memory.balanced_split",
    "Efficiency": "localfeat.efficiency",
    "ImageDataModule": "localfeat.data",
    "Learner": "localfeat.learner",
    "METHODS": "localfeat.objectives",
    "Method": "localfeat.objectives",
    "Objective": "localfeat.objectives",
    "Optimization": "localfeat.optimization",
    "Site": "localfeat.objectives",
    "Split": "localfeat.network",
    "UserError": "localfeat.errors",
    "step_memory": "localfeat.memory.accounting",
}
__all__ = [
    "METHODS",
    "BalancedSplit",
    "Efficiency",
    "ImageDataModule",
    "Learner",
    "Method",
    "Objective",
    "Optimization",
    "Site",
    "Split",
    "UserError",
    "step_memory",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'localfeat' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""A timm backbone, its blocks, and the local modules they are grouped into."""

from localfeat.network.backbone import build_backbone, model_name
from localfeat.network.blocks import Decomposition, decompose
from localfeat.network.layout import FeatureShape
from localfeat.network.local_module import LocalModule, LocalOutput
from localfeat.network.modes import evaluating
from localfeat.network.split import Split, as_split

__all__ = [
    "Decomposition",
    "FeatureShape",
    "LocalModule",
    "LocalOutput",
    "Split",
    "as_split",
    "build_backbone",
    "decompose",
    "evaluating",
    "model_name",
]

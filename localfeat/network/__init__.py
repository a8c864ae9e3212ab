"""A timm backbone, its blocks, and the local modules they are grouped into."""

from localfeat.network.backbone import build_backbone, model_name
from localfeat.network.blocks import Decomposition, decompose
from localfeat.network.fused_mlp import fuse_mlps
from localfeat.network.layout import FeatureShape
from localfeat.network.local_module import BlockRunner, LocalModule, LocalOutput, weighted_sum
from localfeat.network.modes import evaluating
from localfeat.network.recompute import block_runners
from localfeat.network.split import Split, as_split
from localfeat.network.window_attention import fuse_window_attention

__all__ = [
    "BlockRunner",
    "Decomposition",
    "FeatureShape",
    "LocalModule",
    "LocalOutput",
    "Split",
    "as_split",
    "block_runners",
    "build_backbone",
    "decompose",
    "evaluating",
    "fuse_mlps",
    "fuse_window_attention",
    "model_name",
    "weighted_sum",
]

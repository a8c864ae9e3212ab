"""The networks and settings of the study. Tests replace them by small ones."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.memory.cases import PRECISIONS, Case, Network, efficiencies, mixed
from experiments.memory.search import WAYS, Way
from localfeat.memory.emulation import Precision

SWIN_TINY = Network("Swin-T", "swin_tiny_patch4_window7_224", source=32)
"""The paper's setting: batch 128, 224 px resized from images of 32 px."""


def _depth() -> tuple[Network, ...]:
    names = {
        "Swin-T": "swin_tiny_patch4_window7_224",
        "Swin-S": "swin_small_patch4_window7_224",
        "Swin-L": "swin_large_patch4_window7_224",
        "ViT-S/16": "vit_small_patch16_224",
        "ViT-B/16": "vit_base_patch16_224",
        "ViT-L/16": "vit_large_patch16_224",
        "ViT-g/14": "vit_giant_patch14_224",
    }
    return tuple(Network(label, name, batch_size=32) for label, name in names.items())


def _large() -> tuple[Network, ...]:
    return (
        Network("Swin-B, 384 px", "swin_base_patch4_window12_384", image_size=384, batch_size=32),
        Network("Swin-L, 384 px", "swin_large_patch4_window12_384", image_size=384, batch_size=32),
        Network("ViT-L/16, 224 px", "vit_large_patch16_224", batch_size=32),
        Network("ViT-g/14, 224 px", "vit_giant_patch14_224", batch_size=32),
    )


def _timed() -> tuple[Case, ...]:
    known = efficiencies()
    lean = known["lean"]
    return (
        *(Case("e2e", efficiency=known[name]) for name in ("none", "lean", "selective", "checkpoint", "slices")),
        Case("e2e", accumulate=4),
        Case("feature_recon", (2, 4, 10)),
        Case("feature_recon", (1, 2, 5)),
        Case("feature_recon", (1, 2, 5), lean),
        Case("greedy_ce", (1, 2, 5), lean),
        Case("feature_recon", (4, 7, 9), mixed(range(1, 4), slices=2)),
        Case("feature_recon", (5, 7, 9), mixed(range(1, 5), slices=2)),
        Case("feature_recon", (5, 7, 9), mixed(range(1, 5), slices=4)),
        Case("greedy_ce", (4, 7, 9), mixed(range(1, 4), slices=2)),
        Case("feature_recon", tuple(range(1, 12)), lean),
    )


@dataclass(frozen=True)
class Plan:
    """Networks, settings and budgets of all parts.

    Args:
        main: network of the parts paper, bf16, ours and time.
        efficiencies: names of the settings compared in the part ours, ``none`` first, with ``checkpoint`` among them.
        paper_efficiencies: names of the settings in the parts paper and bf16, ``none`` first.
        modules: numbers K of local modules.
        micro_batches: numbers of images per part of an accumulated batch.
        ways: ways to recompute blocks that the search tries.
        work_limits: limits on the work in the search, relative to plain end-to-end training.
        budgets: memory of the devices in GiB.
        probes: batch sizes between which the largest batch is interpolated.
        timed: cases to time; the first is the reference.
        timed_batch: images per timed step.
        rounds, warm_up: number of timed and of warm-up rounds over all timed cases.
    """

    main: Network = SWIN_TINY
    precisions: tuple[Precision, ...] = PRECISIONS
    methods: tuple[str, ...] = ("greedy_ce", "feature_recon")
    efficiencies: tuple[str, ...] = ("none", "lean", "selective", "checkpoint", "slices")
    paper_efficiencies: tuple[str, ...] = ("none", "lean")
    decoders: tuple[str, ...] = ("interp", "one_layer", "deconv")
    modules: tuple[int, ...] = (2, 3, 4, 6, 8, 12)
    micro_batches: tuple[int, ...] = (64, 32, 16, 8)
    ways: tuple[Way, ...] = WAYS
    work_limits: tuple[float, ...] = (1.05, 1.10, 1.15, 1.20, 1.25)
    depth: tuple[Network, ...] = field(default_factory=_depth)
    large: tuple[Network, ...] = field(default_factory=_large)
    budgets: tuple[float, ...] = (8, 12, 24)
    probes: tuple[int, ...] = (16, 48)
    timed: tuple[Case, ...] = field(default_factory=_timed)
    timed_batch: int = 8
    rounds: int = 7
    warm_up: int = 1

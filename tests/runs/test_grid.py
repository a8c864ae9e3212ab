"""Every method, split and decoder on the paper's backbone, and on every dataset in its published format on disk."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from localfeat.backbones.timm_models import build_backbone
from localfeat.learner.module import Learner
from localfeat.methods.registry import METHODS
from localfeat.run.command import run
from localfeat.run.export import build_backbone as build_exported
from tests.helpers.formats import write_source
from tests.helpers.small import AtStep, trainer
from tests.helpers.whole_runs import composed, draw_nothing, exported, small_run

SPLITS = {"k2": [4, 8], "k4": [2, 2, 6, 2]}  # blocks per module of Swin-T
DECODERS = ["interp", "one_layer", "deconv"]
RECONSTRUCT = [name for name, method in METHODS.items() if method.decodes]
QUICK = [("e2e", "k2", "one_layer"), ("image_recon", "k2", "interp"), ("feature_recon", "k4", "deconv")]
CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10, "svhn": 10}


@pytest.fixture(scope="module")
def swin_tiny() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return Swin-T for 224 px and 10 classes, and its initial weights."""
    torch.manual_seed(0)
    network = build_backbone("swin_tiny_patch4_window7_224", 10, image_size=224, drop_path_rate=0.0)
    return network, copy.deepcopy(network.state_dict())


# Without a decoder the three cases compute the same: one is enough.
GRID = [
    pytest.param(m, s, d, marks=[] if (m, s, d) in QUICK else pytest.mark.slow)
    for m, s, d in itertools.product(METHODS, SPLITS, DECODERS)
    if m in RECONSTRUCT or d == "one_layer"
]


@pytest.mark.parametrize(("method", "split", "decoder"), GRID)
def test_one_step_of_swin_tiny_at_224(
    method: str, split: str, decoder: str, swin_tiny: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    network, weights = swin_tiny
    network.load_state_dict(weights)
    network.zero_grad()
    model = Learner(network, method, len(SPLITS[split]), decoder)
    modules = SPLITS[split] if METHODS[method].local else [12]
    assert model.blocks_per_module == modules
    for module in model.local_modules[:-1]:
        assert (getattr(module.objective, "decoder", None) is not None) == (method in RECONSTRUCT)
        frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        assert bool(frozen) == method.startswith("man") and all(".average." in name for name in frozen)

    seen: list[tuple[float, bool]] = []
    for module in model.local_modules:
        module.register_forward_hook(
            lambda m, inputs, output: seen.append(
                (output.loss.item(), inputs[0].requires_grad or output.features.requires_grad)
            )
        )
    stepped: list[int] = []

    def look(_: Any, number: int) -> None:
        stepped.append(number)
        for name, parameter in model.local_modules[number].named_parameters():
            if not parameter.requires_grad or name.endswith(".share"):  # man_plus: at first both copies are equal
                continue
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any()), name

    # Three images, because a contrastive loss of two is constant: one class has no negatives, two have no positives.
    images = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(images, torch.tensor([3, 3, 5])), batch_size=3)
    trainer(AtStep(look), max_steps=1).fit(model, data)
    assert stepped == list(range(len(modules)))
    assert len(seen) == len(modules)
    assert all(math.isfinite(loss) and not attached for loss, attached in seen)
    moved = network.state_dict()
    assert not [name for name, p in network.named_parameters() if torch.equal(moved[name], weights[name])]


@pytest.mark.parametrize("dataset", CLASSES)
def test_one_batch_of_every_dataset_in_its_published_format(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the published format to exported weights, with a classifier of the right size."""
    draw_nothing(monkeypatch)
    write_source(monkeypatch, dataset, tmp_path / "data")
    summary = small_run(
        tmp_path / "run",
        f"dataset={dataset}",
        f"dataset.root={tmp_path / 'data'}",
        "dataset.download=false",
        "image_size=32",
        "epochs=1",
        "trainer.limit_train_batches=1",
        "trainer.limit_val_batches=1",
        "trainer.limit_test_batches=1",
        f"dataset.val_fraction={0.34 if dataset in ('stl10', 'svhn', 'cifar100') else 0.2}",
    )
    assert (summary["dataset"], len(summary["classes"])) == (dataset, CLASSES[dataset])
    assert exported(tmp_path / "run")["head.fc.weight"].shape[0] == CLASSES[dataset]
    assert build_exported(tmp_path / "run" / "backbone.safetensors").num_classes == CLASSES[dataset]
    assert all(math.isfinite(loss) for loss in summary["module_losses"].values())


@pytest.mark.slow  # the README's second command is this one
def test_the_papers_setting_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``dataset=cifar100 method=feature_recon split=k4`` with nothing reduced but the amount of data."""
    write_source(monkeypatch, "cifar100", tmp_path / "data")
    overrides = ["dataset=cifar100", "method=feature_recon", "split=k4", f"dataset.root={tmp_path / 'data'}"]
    less = ["batch_size=4", "epochs=1", "dataset.val_fraction=0.34", "trainer=cpu"]
    limits = [f"trainer.limit_{stage}_batches=1" for stage in ("train", "val", "test")]
    summary = run(composed(*overrides, *less, *limits), tmp_path / "run")
    assert summary["backbone"] == "swin_tiny_patch4_window7_224"
    assert summary["split"] == [2, 2, 6, 2]
    assert summary["decoder"] == "OneLayerDecoder"
    assert summary["parameters"]["backbone"] == 27_519_354 + 100 * (768 + 1)  # Swin-T, and a classifier of 100
    assert exported(tmp_path / "run")["head.fc.weight"].shape == (100, 768)

"""Vision models of Hugging Face's transformers: cut by a pattern of names, and trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import localfeat
from tests.helpers.small import CLASSES, trainer

pytestmark = pytest.mark.slow  # importing a model of transformers takes seconds

_VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
_SWIN = {"patch_size": 2, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 2}
_CONV = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1]}
MODELS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any], str]] = {
    "vit": (hf.ViTForImageClassification, hf.ViTConfig, _VIT, r"layers\.\d+"),
    "deit": (hf.DeiTForImageClassification, hf.DeiTConfig, _VIT, r"layers\.\d+"),
    "beit": (hf.BeitForImageClassification, hf.BeitConfig, _VIT, r"layers\.\d+"),
    "dinov2": (hf.Dinov2ForImageClassification, hf.Dinov2Config, _VIT, r"encoder\.layer\.\d+"),
    "swin": (hf.SwinForImageClassification, hf.SwinConfig, _SWIN, r"encoder\.layers\.\d+\.blocks\.\d+"),
    "swinv2": (hf.Swinv2ForImageClassification, hf.Swinv2Config, _SWIN, r"encoder\.layers\.\d+\.blocks\.\d+"),
    "convnext": (hf.ConvNextForImageClassification, hf.ConvNextConfig, _CONV, r"encoder\.stages\.\d+\.layers\.\d+"),
    "resnet": (hf.ResNetForImageClassification, hf.ResNetConfig, _CONV, r"encoder\.stages\.\d+\.layers\.\d+"),
}


class Logits(nn.Module):
    """A network that returns logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.network(images).logits)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_cut_and_trains(name: str) -> None:
    model, config, settings, blocks = MODELS[name]
    network = Logits(model(config(image_size=32, num_labels=CLASSES, **settings)))
    pieces = localfeat.decompose(network, 32, blocks=rf"network\.\w+\.{blocks}")
    depths = settings.get("depths", [1, 1, 1, 1])
    assert (pieces.stage_depths, pieces.num_classes) == (depths, CLASSES)
    before = {name: value.clone() for name, value in network.named_parameters()}
    learner = localfeat.Learner(pieces, "feature_recon", 2)
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % CLASSES)
    trainer().fit(learner, DataLoader(data, batch_size=4))
    still = {name for name, value in network.named_parameters() if torch.equal(value, before[name])}
    assert still <= {name for name in before if name.endswith(("mask_token", "key.bias", "k_proj.bias"))}, still
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(learner.eval()(images), network.eval()(images))

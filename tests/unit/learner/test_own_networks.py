"""Networks that are not timm's: torchvision's by timm's names, a user's own by a pattern."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import localfeat
from localfeat.utils.errors import UserError
from tests.helpers.small import CLASSES, trainer

TORCHVISION: dict[str, tuple[int, list[int]]] = {
    "resnet18": (32, [2, 2, 2, 2]),
    "convnext_tiny": (32, [3, 3, 9, 3]),
    "swin_t": (56, [2, 2, 6, 2]),
    "vit_b_16": (224, [1] * 12),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_networks_are_cut(name: str) -> None:
    size, stages = TORCHVISION[name]
    with torch.device("meta"):
        network = torchvision.models.get_model(name, num_classes=CLASSES)
    pieces = localfeat.decompose(network, size)
    assert (pieces.stage_depths, pieces.num_classes, pieces.image) == (stages, CLASSES, (3, size, size))


class Own(nn.Module):
    """A network with names of its own, for grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(1, 8, 4, stride=4)
        self.phases = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(4))
        self.exit = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.entry(images)
        for phase in self.phases:
            x = x + phase(x)
        return cast(Tensor, self.exit(x.mean((2, 3))))


@pytest.mark.parametrize("method", ["feature_recon", "image_recon", "greedy_ce", "e2e"])
@pytest.mark.parametrize("split", [2, localfeat.BalancedSplit(k=3)], ids=["even", "balanced"])
def test_a_users_own_network_trains(method: str, split: Any) -> None:
    network = Own()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    learner = localfeat.Learner(localfeat.decompose(network, (16, 24), blocks=r"phases\.\d"), method, split)
    assert (learner.num_classes, learner.backbone) == (CLASSES, network)
    data = TensorDataset(torch.randn(16, 1, 16, 24), torch.arange(16) % 3)
    trainer().fit(learner, DataLoader(data, batch_size=8))
    assert all(not torch.equal(value, before[name]) for name, value in network.state_dict().items())
    images = torch.randn(3, 1, 16, 24)
    torch.testing.assert_close(learner.eval()(images), network.eval()(images))


def test_a_network_without_logits_is_refused() -> None:
    with torch.device("meta"):
        network = torchvision.models.get_model("resnet18")
    network.fc = nn.Unflatten(1, (512, 1))
    with pytest.raises(UserError, match=r"^cannot split this ResNet: it returns something else than logits"):
        localfeat.decompose(network, 32)

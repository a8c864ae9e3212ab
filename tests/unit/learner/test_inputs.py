"""A library user's mistakes are one line: arguments of the learner, batches of one's own loader."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from localfeat import Efficiency, Learner, Optimization
from localfeat.learner.inputs import check_batch
from localfeat.utils.errors import UserError
from tests.helpers.small import backbone, batch, learner, trainer

IMAGES = torch.zeros(4, 3, 32, 32)
HARD, SOFT = torch.tensor([0, 1, 2, 1]), torch.full((4, 3), 1 / 3)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"optimization": {"lr": 1e-3}}, r"optimization is dict: give localfeat\.Optimization\(…\)"),
        ({"optimization": torch.optim.AdamW}, r"optimization is AdamW: give localfeat\.Optimization\(…\)"),
        ({"efficiency": "lean"}, r"efficiency is str: give localfeat\.Efficiency\(…\)"),
        ({"method": {"name": "e2e"}}, r"method is dict: give a name, one of .*feature_recon"),
        ({"method": Learner}, r"method is type|method is .*: give a name"),
        ({"decoder": {"interp": 1}}, r"decoder=.* it is one of interp"),
        ({"split": {"modules": 4}}, r"split=\{'modules': 4\}: give K, a list of cuts"),
        ({"split": 2.0}, r"split=2\.0: give K, a list of cuts"),
    ],
)
def test_arguments_of_the_learner(arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        Learner(backbone(), **arguments)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (lambda: "swin_tiny_patch4_window7_224", "the backbone is str: give a model"),
        (lambda: timm.create_model("test_vit", num_classes=0), "num_classes=0 has no classifier"),
        (lambda: torchvision.models.resnet18(), "the backbone ResNet has no num_classes"),
    ],
)
def test_a_backbone_without_a_classifier(model: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        Learner(model())


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"image": IMAGES, "label": HARD}, r"a batch is \(images, labels\).*; this one is dict"),
        ((IMAGES, HARD, HARD), "this one is Tensor, Tensor, Tensor"),
        ((IMAGES, [0, 1, 2, 1]), "this one is Tensor, list"),
        (IMAGES, "this one is Tensor"),
        ((IMAGES.byte(), HARD), "images are uint8: give normalised floats"),
        ((IMAGES[0], HARD), r"images have the shape \[3, 32, 32\]"),
        ((IMAGES, HARD[:3]), r"labels of shape \[3\] for 4 images"),
        ((IMAGES, torch.tensor(1)), r"labels of shape \[\] for 4 images"),
        ((IMAGES[:0], HARD[:0]), "a batch without images"),
        ((IMAGES.double(), HARD), "images are float64: give float32"),
        ((IMAGES, HARD.int()), r"labels are int32: class indices are int64, labels\.long\(\)"),
        ((IMAGES, HARD.float()), r"labels are float32 \[4\]: class indices are int64 \(B,\)"),
        ((IMAGES, HARD[:, None]), r"labels have the shape \[4, 1\]"),
        ((IMAGES, HARD + 1), "labels lie between 1 and 3: this classifier has the classes 0 to 2"),
        ((IMAGES, HARD - 1), "labels lie between -1 and 1"),
        ((IMAGES, (SOFT > 0).float()), "probabilities that sum to 1 for every image"),
        ((IMAGES, SOFT[:, :2]), r"labels are float32 \[4, 2\]"),
    ],
)
def test_batches(given: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        check_batch(given, 3, training=True)
    for labels in (HARD, SOFT):
        check_batch((IMAGES, labels), 3, training=True)


@pytest.mark.parametrize(
    ("family", "shape", "taken"),
    [
        ("swin", (4, 1, 32, 32), "3, 32, 32"),
        ("swin", (4, 3, 32, 48), "3, 32, 32"),
        ("vit", (4, 3, 16, 16), "3, 32, 32"),
        ("resnet", (4, 4, 48, 48), "3, 48, 48"),
        ("swin", (4, 3, 32, 32), None),
        ("convnext", (4, 3, 48, 48), None),
    ],
)
def test_images_fit_the_backbone(family: str, shape: tuple[int, ...], taken: str | None) -> None:
    given = (torch.zeros(shape), HARD)
    if taken is None:
        check_batch(given, 3, training=True, backbone=backbone(family))
        return
    with pytest.raises(UserError, match=rf"images have the shape \[.*\]: this backbone takes \[B, {taken}\]"):
        check_batch(given, 3, training=True, backbone=backbone(family))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"devices": 2}, r"DDPStrategy: localfeat trains on one device for now, Trainer\(devices=1\)"),
        ({"gradient_clip_val": 1.0}, r"optimization=localfeat\.Optimization\(gradient_clip=1\.0\)"),
        ({"accumulate_grad_batches": 2}, r"optimization=localfeat\.Optimization\(accumulate=2\)"),
    ],
)
def test_settings_of_the_trainer(arguments: dict[str, Any], line: str) -> None:
    model = learner("e2e", 1)
    model.trainer = trainer(**arguments)
    model.trainer.state.fn = TrainerFn.FITTING
    with pytest.raises(UserError, match=line):
        model.configure_callbacks()


def test_what_a_stage_needs() -> None:
    with pytest.raises(UserError, match="a batch of 1: this method compares the images of a batch, at least 2"):
        check_batch((IMAGES[:1], HARD[:1]), 3, training=True, at_least=2)
    with pytest.raises(UserError, match=r"labels are float32 \[4, 3\]: class indices are int64 \(B,\)$"):
        check_batch((IMAGES, SOFT), 3, training=False)
    check_batch((IMAGES[:1], HARD[:1]), 3, training=False)


def own(images: Tensor, labels: Tensor, size: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(images, labels), batch_size=size)


def test_the_trainer_tells_it() -> None:
    images, labels = batch()
    with pytest.raises(UserError, match="labels are int32"):
        trainer().fit(learner("greedy_ce", 2), own(images, labels.int()))
    with pytest.raises(UserError, match="a batch of 1"):
        trainer().fit(learner("feature_recon", 2), own(images, labels, 1))
    with pytest.raises(UserError, match="labels lie between"):
        trainer().validate(learner("greedy_ce", 2), own(images, labels + 100), verbose=False)


def test_predict_takes_images_with_and_without_labels() -> None:
    images, labels = batch()
    model = learner("greedy_ce", 2)
    expected = model.eval()(images)
    for loader in (own(images, labels), DataLoader(images, batch_size=8)):
        assert torch.equal(torch.cat(trainer().predict(model, loader)), expected)
    with pytest.raises(UserError, match="images are uint8"):
        trainer().predict(model, DataLoader(images.byte(), batch_size=8))


def test_none_means_the_default() -> None:
    made = Learner(backbone(), "e2e", 1, optimization=None, efficiency=None)
    assert made.optimization == Optimization() and made.efficiency == Efficiency()

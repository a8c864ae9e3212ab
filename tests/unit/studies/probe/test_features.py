"""What is taken where, in every layout; which images are looked at."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from localfeat.backbones.decompose import decompose
from localfeat.data.datamodule import ImageDataModule
from localfeat.studies.probe.features import Network, Place, sample
from localfeat.utils.errors import UserError
from tests.helpers import small
from tests.helpers.reference import hooked_means


@pytest.fixture(scope="module")
def digits() -> ImageDataModule:
    return ImageDataModule("digits", image_size=small.IMAGE_SIZE, batch_size=16)


def network(family: str, digits: ImageDataModule, split: int | list[int] = 4) -> Network:
    learner = small.learner("greedy_ce", split, family).eval()
    small.disturbed(learner.backbone)
    return Network(Path("run"), {}, digits, learner, decompose(learner.backbone, small.IMAGE_SIZE))


@pytest.mark.parametrize("family", small.FAMILIES)
def test_means_are_those_of_timms_own_blocks(family: str, digits: ImageDataModule) -> None:
    opened = network(family, digits)
    loader = sample(digits, "val", 20)
    found = opened.features(loader)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    inputs, _ = digits.prepare(images, labels, training=False)
    expected, predictions = hooked_means(family, opened.learner.backbone, inputs)
    assert torch.equal(found.labels, labels) and len(labels) == 20
    np.testing.assert_array_equal(found.predictions, predictions)
    assert len(found.means) == len(expected) + 1 == len(opened.places)
    for place, means, reference in zip(opened.places[1:], found.means[1:], expected, strict=True):
        np.testing.assert_allclose(means, reference, rtol=1e-4, atol=1e-5)
        assert means.shape == (20, place.channels)
    assert all(a.shape != b.shape or not torch.equal(a, b) for a, b in pairwise(found.means))


def test_patch_embeddings_come_before_the_first_block(digits: ImageDataModule) -> None:
    opened = network("swin", digits)
    images, labels = next(iter(sample(digits, "val", 10)))
    inputs, _ = digits.prepare(images, labels, training=False)
    expected = opened.learner.backbone.patch_embed(inputs).mean((1, 2))  # type: ignore[operator]
    torch.testing.assert_close(opened.features(sample(digits, "val", 10)).means[0], expected.detach())


def test_places_say_where_modules_end(digits: ImageDataModule) -> None:
    assert network("swin", digits, [1, 3]).places == [
        Place(None, 1, 16, False),
        Place(0, 1, 16, True),
        Place(1, 2, 32, False),
        Place(2, 2, 64, True),
        Place(3, 3, 128, True),
    ]


def test_diverged_networks_are_refused(digits: ImageDataModule) -> None:
    opened = network("swin", digits)
    with torch.no_grad():
        next(iter(opened.pieces.blocks[2].parameters())).fill_(torch.nan)
    with pytest.raises(UserError, match="run: the features of block 3 are not finite"):
        opened.features(sample(digits, "val", 10))


def test_a_sample_is_random_and_always_the_same(digits: ImageDataModule) -> None:
    everything = torch.cat([labels for _, labels in digits.ordered_loader("val")])
    first, second = (torch.cat([labels for _, labels in sample(digits, "val", 50)]) for _ in range(2))
    assert torch.equal(first, second) and len(first) == 50
    assert not torch.equal(first, everything[:50])
    assert torch.equal(torch.cat([labels for _, labels in sample(digits, "val", 10**6)]), everything)
    images = torch.cat([images for images, _ in sample(digits, "val", 50)])
    assert len(images.flatten(1).unique(dim=0)) == 50, "no image twice"

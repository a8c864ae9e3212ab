"""Methods: weights over depth, and which parts each method builds."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localfeat.backbones.layout import FeatureShape
from localfeat.methods.head_and_decoder import HeadAndDecoder
from localfeat.methods.parts.decoders import DeconvDecoder, OneLayerDecoder
from localfeat.methods.registry import METHODS, as_method
from localfeat.methods.site import Site
from localfeat.utils.errors import UserError

SHAPE = FeatureShape("NHWC", 16, 8, 8)


def site(index: int, modules: int) -> Site:
    return Site(index, modules, SHAPE, FeatureShape("NHWC", 32, 4, 4), (32, 32), 5)


def weights(index: int, modules: int, name: str = "feature_recon") -> tuple[float, float]:
    found = METHODS[name].build(site(index, modules), OneLayerDecoder).weights
    return found["reconstruction"], found["contrast"]


def test_weights_of_the_paper() -> None:
    assert weights(0, 2) == (3, 1)
    assert [weights(i, 4) for i in range(3)] == [(3, 1), (2, 2), (1, 3)]
    assert [weights(i, 3) for i in range(2)] == [(3, 1), (1, 3)]


@given(st.integers(2, 60), st.floats(0, 10), st.floats(0, 10))
def test_weights_go_from_the_first_to_the_last_and_stay_between(modules: int, first: float, last: float) -> None:
    values = [site(i, modules).interpolate(first, last) for i in range(modules - 1)]
    assert values[0] == first
    if modules > 2:
        assert values[-1] == pytest.approx(last)
    assert all(min(first, last) - 1e-9 <= value <= max(first, last) + 1e-9 for value in values)
    steps = [b - a for a, b in pairwise(values)]
    assert all(step == pytest.approx(steps[0], abs=1e-9) for step in steps)


def test_default_weights_are_never_negative() -> None:
    assert all(w >= 0 for k in range(2, 40) for i in range(k - 1) for w in weights(i, k))


@pytest.mark.parametrize(
    ("name", "terms", "outputs", "uses_images"),
    [
        ("greedy_ce", {"cross_entropy"}, 5, False),
        ("greedy_contrast", {"contrast"}, 128, False),
        ("image_recon", {"contrast", "reconstruction"}, 128, True),
        ("feature_recon", {"contrast", "reconstruction"}, 128, False),
    ],
)
def test_parts_of_each_method(name: str, terms: set[str], outputs: int, uses_images: bool) -> None:
    objective = METHODS[name].build(site(0, 2), DeconvDecoder)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 1])
    found, logits = objective(torch.randn(2, 8, 8, 16), torch.randn(2, 4, 4, 32), images, labels)
    assert found.keys() == objective.weights.keys() == terms
    assert logits is None
    assert objective.head[-1].out_features == outputs
    assert objective.uses_images is uses_images
    assert (objective.decoder is not None) == ("reconstruction" in terms)


@pytest.mark.parametrize(("name", "shape"), [("image_recon", (3, 32, 32)), ("feature_recon", (16, 8, 8))])
def test_decoder_reaches_the_shape_of_the_target(name: str, shape: tuple[int, ...]) -> None:
    objective = METHODS[name].build(site(0, 2), OneLayerDecoder)
    shown = objective.reconstruct(torch.randn(2, 8, 8, 16), torch.randn(2, 4, 4, 32), torch.randn(2, 3, 32, 32), 1)
    assert shown is not None
    assert shown.output.shape == shown.target.shape == (2, *shape)
    assert shown.output.min() >= 0
    assert shown.output.max() <= 1


def test_auxiliary_block_is_layer_norm_convolution_and_gelu() -> None:
    block = METHODS["feature_recon"].build(site(0, 2), OneLayerDecoder).auxiliary
    x = torch.randn(2, 4, 4, 32)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    maps = torch.nn.functional.conv2d(normed.permute(0, 3, 1, 2), block.conv.weight, block.conv.bias, padding=1)
    expected = maps * (1 + torch.erf(maps / 2**0.5)) / 2
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"supervision": "ce"}, "method.supervision=ce: it is one of contrast, cross_entropy"),
        ({"reconstruct": "input"}, "method.reconstruct=input: it is one of null, image, features"),
        ({"reconstruction_loss": "l2"}, "method.reconstruction_loss=l2"),
        ({"reconstruction_weight": (1.0, -1.0)}, "method.reconstruction_weight=[1.0, -1.0]"),
        ({"supervision_weight": (1.0,)}, "method.supervision_weight=[1.0]"),
        ({"temperature": 0.0}, "method.temperature=0.0: it must be above 0"),
        ({"label_smoothing": 1.0}, "method.label_smoothing=1.0: it lies in [0, 1)"),
    ],
)
def test_wrong_values_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        as_method("feature_recon", **changes)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_methods_by_name_by_value_and_changed() -> None:
    assert as_method("image_recon") is not None
    own = HeadAndDecoder("mine", supervision="cross_entropy", reconstruct="features")
    assert as_method(own) == own
    assert as_method("e2e", label_smoothing=0.1) == dataclasses.replace(METHODS["e2e"], label_smoothing=0.1)
    with pytest.raises(UserError, match="method=infopro: it is one of e2e, "):
        as_method("infopro")
    assert [name for name, method in METHODS.items() if method.contrasts] == [
        "greedy_contrast",
        "image_recon",
        "feature_recon",
    ]

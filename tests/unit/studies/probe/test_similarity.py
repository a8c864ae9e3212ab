"""Linear CKA: its invariances, and the same by Gram matrices."""

from __future__ import annotations

import pytest
import torch

from localfeat.studies.probe.similarity import linear_cka_matrix
from tests.helpers import reference


def features(channels: int, seed: int = 0, count: int = 200) -> torch.Tensor:
    spread = torch.linspace(0.1, 2, channels)
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed)) * spread + 1


def test_matrix_equals_the_one_by_gram_matrices() -> None:
    base = features(8)
    own = [base, base[:, :3] ** 2, features(5, 1)]
    other = [base.cos(), torch.cat([base, features(4, 2)], 1)]
    found = linear_cka_matrix(own, other)
    expected = [[reference.cka(x.double().numpy(), y.double().numpy()) for y in other] for x in own]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert found.shape == (3, 2) and len({round(float(value), 2) for value in found.flatten()}) >= 4


def test_rotation_scale_and_shift_change_nothing_and_stretching_does() -> None:
    x = features(12)
    rotation, _ = torch.linalg.qr(features(12, 3, 12))
    for same in (x, 7 * x, x + 100, x @ rotation):
        assert linear_cka_matrix([x], [same]).item() == pytest.approx(1, abs=1e-5)
    assert linear_cka_matrix([x], [x * torch.linspace(1, 30, 12).flip(0)]).item() < 0.9


def test_features_of_nothing_in_common_are_not_alike() -> None:
    assert linear_cka_matrix([features(4, 0, 4000)], [features(4, 1, 4000)]).item() < 0.01


def test_constant_features_are_like_nothing() -> None:
    constant = torch.full((200, 5), 0.1)
    found = linear_cka_matrix([constant, features(4)], [features(3)])
    assert found[0].isnan().all() and found[1].isfinite().all()

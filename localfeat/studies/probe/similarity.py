"""Linear CKA: how alike two networks' features of the same images are, up to rotation and scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_cka_matrix(own: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Linear CKA of every features (N, C_i) of ``own`` with every features (N, D_j) of ``other``, as float64.

    ``|Y'X|² / (|X'X| |Y'Y|)`` in Frobenius norms of centred features (Kornblith et al. 2019, arXiv 1905.00414,
    equation 5): 1 for features equal up to rotation and scale. Few images make it too large (it is biased by about
    the number of channels per image). NaN where features are constant.
    """
    rows, columns = [_normalised(x) for x in own], [_normalised(y) for y in other]
    values = [[(x.T @ y).square().sum() for y in columns] for x in rows]
    return torch.tensor(values, dtype=torch.float64)


def _normalised(x: Tensor) -> Tensor:
    """Centred, and scaled so that ``|X'X|`` is 1."""
    centred = x.double() - x.double().mean(0)
    norm = (centred.T @ centred).norm()
    constant = norm <= len(x) * (1e-6 * x.double().abs().max()) ** 2  # nothing but float32's rounding is left
    return centred / torch.where(constant, torch.nan, norm).sqrt()

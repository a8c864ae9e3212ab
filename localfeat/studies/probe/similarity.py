"""Linear CKA: the similarity of two networks' features of the same images, up to rotation and scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_cka_matrix(own: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Return the linear CKA of all pairs of features (N, C_i) in ``own`` and (N, D_j) in ``other``, as float64.

    ``|Y'X|² / (|X'X| |Y'Y|)`` in Frobenius norms of centred features (Kornblith et al. 2019, arXiv 1905.00414,
    equation 5): 1 for features equal up to rotation and scale. With few images it is too large (the bias is about the
    number of channels per image). It is NaN for constant features.
    """
    rows, columns = [_normalised(x) for x in own], [_normalised(y) for y in other]
    values = [[(x.T @ y).square().sum() for y in columns] for x in rows]
    return torch.tensor(values, dtype=torch.float64)


def _normalised(x: Tensor) -> Tensor:
    """Return ``x`` centred, and scaled so that ``|X'X|`` is 1."""
    centred = x.double() - x.double().mean(0)
    norm = (centred.T @ centred).norm()
    constant = norm <= len(x) * (1e-6 * x.double().abs().max()) ** 2  # only float32 rounding is left
    return centred / torch.where(constant, torch.nan, norm).sqrt()

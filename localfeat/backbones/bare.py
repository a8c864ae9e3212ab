"""Copies of modules without data."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def bare_tensors(module: nn.Module) -> dict[int, Any]:
    """Return a memo that makes ``copy.deepcopy`` copy a module's parameters and buffers to the meta device.

    deepcopy takes everything in its memo as copied already, so data is never duplicated.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        bare = torch.empty_like(parameter, device="meta", requires_grad=False)
        memo[id(parameter)] = nn.Parameter(bare, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return memo


def without_data(module: nn.Module) -> nn.Module:
    """Return a copy on the meta device."""
    return copy.deepcopy(module, bare_tensors(module))

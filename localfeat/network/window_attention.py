"""Windowed attention as one operation that keeps queries, keys and values and no attention matrix."""

from __future__ import annotations

from torch import nn


def fuse_window_attention(model: nn.Module) -> None:
    """Let every windowed attention of a Swin run as one operation; other models have none and stay as they are."""

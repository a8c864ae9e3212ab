"""Values per channel, and numbers of channels."""

from __future__ import annotations

from collections.abc import Sequence

from localfeat.utils.errors import UserError


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return the values if there is one for every channel, else their mean for each channel."""
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels


def check_channels(in_chans: int) -> None:
    """Check a number of channels.

    Raises:
        UserError: it is no whole number, or below 1.
    """
    if not isinstance(in_chans, int) or in_chans < 1:
        raise UserError(f"in_chans={in_chans}: images have a whole number of channels, at least 1")

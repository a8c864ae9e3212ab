"""W&B without an account: the machine's own login, settings and caches do not reach a test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def without_login(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide all keys and settings from W&B, and let it write below ``home``, which is created."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.delenv("NETRC", raising=False)
    home.mkdir(exist_ok=True)

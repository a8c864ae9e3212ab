"""W&B without an account: nothing of the machine's own login, settings or caches reaches a test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def without_login(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let W&B find neither a key nor settings, and write below ``home``, which is made."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.delenv("NETRC", raising=False)
    home.mkdir(exist_ok=True)

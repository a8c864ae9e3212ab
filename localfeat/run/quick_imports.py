"""Import torch, Lightning and timm sooner: half of a start-up's CPU time is theirs."""

from __future__ import annotations

import atexit
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import within this context: no garbage is collected meanwhile, and timm leaves W&B alone.

    Garbage collection walks over all objects again and again while thousands of modules are added, none of which is
    garbage; if this is the process's first import of torch, it leaves these objects alone from then on, too. timm
    imports wandb for a log of its own training script if it can; localfeat's logger imports it when used.
    """
    modules = cast(dict[str, Any], sys.modules)
    alone = threading.active_count() == 1  # another thread may need wandb meanwhile
    hides, collects, begins = alone and "wandb" not in modules, gc.isenabled(), "torch" not in modules
    gc.disable()
    if hides:
        modules["wandb"] = None  # Python then raises ImportError
    try:
        yield
    finally:
        if hides:
            modules.pop("wandb", None)
        if begins:
            gc.freeze()
            atexit.register(gc.unfreeze)  # nanobind, in triton, lists what the last collection leaves
        if collects:
            gc.enable()

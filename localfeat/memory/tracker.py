"""Allocation accounting by storage: what a caching allocator would have handed out, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from localfeat.memory.event_log import EventLog, StorageRecord

BLOCK_BYTES = 512
"""The CUDA caching allocator rounds every request up to a multiple of this."""


def rounded(size: int) -> int:
    """Return ``size`` in bytes, rounded up to whole allocator blocks."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


class StorageTracker(TorchDispatchMode):
    """Count the bytes of all storages that operations return while it is active, and their peak.

    A storage is counted once, however many views look at it, from the operation that returns it until Python and
    autograd have both dropped it. The meta device works as well as a real one. Not seen: what a kernel allocates
    and frees within one operation (cuDNN and cuBLAS workspaces), fragmentation, and the process's own memory.

    Use it as a context manager, or call ``__enter__`` and ``__exit__`` from two hooks of a trainer. It may be
    entered again; storages freed in between are noticed, storages allocated in between are not.

    Args:
        baseline: tensors that exist already and belong to the figure (weights, buffers, optimizer state,
            gradients). They are registered at the next entry and not kept alive by the tracker.
        log: records every allocation and release.
    """

    def __init__(self, baseline: Iterable[Tensor] = (), log: EventLog | None = None) -> None:
        super().__init__()
        self.log = log
        self._baseline = list(baseline)
        self._bytes_of: dict[int, int] = {}
        self._live = 0
        self._peak = 0

    @property
    def live_bytes(self) -> int:
        """Bytes alive now."""
        return self._live

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once since the start or the last ``reset_peak``."""
        return self._peak

    def reset_peak(self, freeing: int = 0) -> None:
        """Start a new peak at the bytes alive now, less ``freeing``, of a storage that goes at this moment."""
        self._peak = self._live - freeing

    def add(self, tensor: Tensor) -> None:
        """Register the storage of ``tensor``; check a known storage for a new size only."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, rounded(storage.nbytes())
        known = self._bytes_of.get(key)
        if known is None:
            # The storage's Python object lives as long as the storage itself, so this fires when the last tensor,
            # view or saved activation on it is gone. Keys may be handed out again only after that.
            weakref.finalize(storage, self._forget, key).atexit = False
        if size != known:
            self._bytes_of[key] = size
            self._live += size - (known or 0)
            self._peak = max(self._peak, self._live)
            if self.log is not None:
                self.log.allocated(key, size)

    def record(self, tensor: Tensor) -> StorageRecord | None:
        """Return the log's record of the storage of ``tensor``; ``None`` for an unknown one."""
        return None if self.log is None else self.log.record(tensor.untyped_storage()._cdata)

    def _forget(self, key: int) -> None:
        self._live -= self._bytes_of.pop(key)
        if self.log is not None:
            self.log.released(key)

    def __enter__(self) -> StorageTracker:
        for tensor in self._baseline:
            self.add(tensor)
        # Held no longer: a gradient of the baseline that the step frees must count as freed.
        self._baseline.clear()
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result

"""The history of all storages of a step: which were alive at a moment, and when the peak was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(eq=False)
class StorageRecord:
    """One storage, in moments: the number of events (allocations, releases) so far. Alive if born <= moment < died."""

    size: int  # bytes
    born: int
    died: int | None = None


class EventLog:
    """Allocations and releases in order, written by a ``StorageTracker``.

    Attributes:
        moment: number of events so far. Note it where a phase begins.
        records: one per storage, in order of birth; a storage that changes its size gets a new one.
    """

    def __init__(self) -> None:
        self.moment = 0
        self.records: list[StorageRecord] = []
        self._changes: list[int] = []  # bytes by which event i (from moment i to i + 1) changed what is alive
        self._open: dict[int, StorageRecord] = {}

    def allocated(self, key: int, size: int) -> None:
        """Record that a storage was allocated or, if ``key`` is alive, changed its size."""
        if key in self._open:
            self.released(key)
        self._next(size)
        self._open[key] = StorageRecord(size, self.moment)
        self.records.append(self._open[key])

    def released(self, key: int) -> None:
        """Record that a storage was released."""
        record = self._open.pop(key)
        self._next(-record.size)
        record.died = self.moment

    def _next(self, change: int) -> None:
        self._changes.append(change)
        self.moment += 1

    def record(self, key: int) -> StorageRecord | None:
        """Return the record of the storage that is alive under ``key``; ``None`` if none is."""
        return self._open.get(key)

    def alive(self, moment: int) -> Iterator[StorageRecord]:
        """Yield the storages that were alive at a moment."""
        return (r for r in self.records if r.born <= moment and (r.died is None or moment < r.died))

    def peaks(self, bounds: list[int]) -> list[tuple[int, int]]:
        """Return the first peak ``(moment, bytes)`` of each phase between two moments, ends included."""
        live = list(accumulate(self._changes, initial=0))
        moments = (max(range(a, b + 1), key=live.__getitem__) for a, b in pairwise(bounds))
        return [(moment, live[moment]) for moment in moments]

    def peak(self) -> tuple[int, int]:
        """Return the first peak ``(moment, bytes)`` of the whole log."""
        return self.peaks([0, self.moment])[0]

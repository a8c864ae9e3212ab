"""The log of storages against a history worked out by hand, and against the tracker's own totals."""

from __future__ import annotations

import torch

from localfeat.memory.event_log import EventLog
from localfeat.memory.tracker import StorageTracker

KIB = 1024


def test_a_history_by_hand() -> None:
    log = EventLog()
    log.allocated(1, 10)
    log.allocated(2, 5)
    first = log.record(1)
    log.released(1)
    middle = log.moment
    log.allocated(1, 7)  # the key is used again
    log.allocated(3, 1)
    assert [(r.size, r.born, r.died) for r in log.records] == [(10, 1, 3), (5, 2, None), (7, 4, None), (1, 5, None)]
    assert first is log.records[0]
    assert log.record(1) is log.records[2]
    assert log.record(9) is None
    assert log.peak() == (2, 15)
    assert log.peaks([0, middle, log.moment]) == [(2, 15), (5, 13)]
    assert [r.size for r in log.alive(2)] == [10, 5]
    assert [r.size for r in log.alive(middle)] == [5]


def test_a_new_size_is_a_new_record() -> None:
    log = EventLog()
    log.allocated(1, 10)
    log.allocated(1, 30)
    assert [r.size for r in log.alive(log.moment)] == [30]
    assert log.peak()[1] == 30


def test_the_log_agrees_with_the_tracker() -> None:
    weight = torch.zeros(256, requires_grad=True)
    log = EventLog()
    with StorageTracker([weight], log) as tracker:
        y = weight.exp().exp()
        kept = tracker.record(y)
        start = log.moment
        y.backward(torch.ones(256))
        del y
    assert log.peak()[1] == tracker.peak_bytes
    assert sum(record.size for record in log.alive(log.moment)) == tracker.live_bytes == 2 * KIB
    assert kept is not None and kept.born <= start and kept.died is not None
    assert tracker.record(torch.zeros(1)) is None


def test_without_a_log_there_are_no_records() -> None:
    with StorageTracker() as tracker:
        assert tracker.record(torch.zeros(1)) is None

"""The tracker against cases worked out by hand and against torch's own MemTracker."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from localfeat.memory.tracker import StorageTracker, rounded

KIB = 1024


def test_rounding_is_to_whole_blocks() -> None:
    assert [rounded(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_and_peak_follow_allocation_and_release(device: str) -> None:
    with StorageTracker() as tracker:
        first = torch.empty(256, device=device)  # 1 KiB
        second = torch.empty(100, device=device)  # 400 bytes, one block
        assert tracker.live_bytes == KIB + 512
        del first
        assert tracker.live_bytes == 512
        assert tracker.peak_bytes == KIB + 512
        tracker.reset_peak()
        assert tracker.peak_bytes == 512
        del second
    assert tracker.live_bytes == 0


def test_views_and_in_place_operations_allocate_nothing() -> None:
    with StorageTracker() as tracker:
        x = torch.zeros(256)
        view = x.view(16, 16).t()[3:7]
        x.add_(1).mul_(2)
        assert tracker.peak_bytes == KIB
        del x
        assert tracker.live_bytes == KIB, "the view still holds the storage"
        del view
        assert tracker.live_bytes == 0


def test_a_resized_storage_is_counted_at_its_new_size() -> None:
    with StorageTracker() as tracker:
        x = torch.empty(128)
        x.resize_(1024)
        assert tracker.live_bytes == 4 * KIB


def test_baseline_is_counted_once_and_not_kept_alive() -> None:
    weight, gradient = torch.empty(256), torch.empty(512)
    tracker = StorageTracker([weight, weight.view(2, 128), gradient])
    with tracker:
        assert tracker.live_bytes == 3 * KIB
        del gradient
        assert tracker.live_bytes == KIB
        weight.add_(1)
        assert tracker.peak_bytes == 3 * KIB


def test_graph_of_a_chain_is_released_by_backward() -> None:
    """y = exp(exp(x)): forward keeps x, exp(x), y; backward adds one gradient at a time."""
    x = torch.zeros(256, requires_grad=True)
    with StorageTracker([x]) as tracker:
        y = x.exp().exp()
        assert tracker.live_bytes == 3 * KIB
        y.backward(torch.ones(256))
        del y
        assert tracker.live_bytes == 2 * KIB, "only x and its gradient remain"
        x.grad = None
        assert tracker.live_bytes == KIB


def test_entering_and_leaving_in_separate_calls() -> None:
    tracker = StorageTracker()
    tracker.__enter__()
    kept = torch.empty(256)
    tracker.__exit__(None, None, None)
    torch.empty(4096)
    assert tracker.live_bytes == tracker.peak_bytes == KIB
    del kept
    assert tracker.live_bytes == 0, "releases are noticed outside as well"
    with tracker:
        torch.empty(512)
    assert tracker.peak_bytes == 2 * KIB


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16 * 64, 32), nn.ReLU()
    )


def training_step(network: nn.Module, images: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(network.parameters(), foreach=False)

    def step() -> None:
        network(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def test_peak_of_a_training_step_equals_mem_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localfeat.memory.tracker.BLOCK_BYTES", 1)  # MemTracker rounds on CUDA only
    mem_tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    images = torch.randn(8, 3, 8, 8)

    network = small_network()
    reference = mem_tracker.MemTracker()
    reference.track_external(network, images)
    with reference:
        training_step(network, images)()
    expected = reference.get_tracker_snapshot("peak")[images.device]["Total"]

    network = small_network()
    with StorageTracker([*network.parameters(), *network.buffers(), images]) as tracker:
        training_step(network, images)()
    assert tracker.peak_bytes == expected
    assert tracker.peak_bytes > 1.5 * sum(p.nbytes for p in network.parameters())

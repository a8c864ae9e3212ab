"""``split=balanced``: no division of a network has a lower peak, and runs that are cut so can be gone on with."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from localfeat import BalancedSplit
from localfeat.learner.module import Learner
from localfeat.memory.accounting import step_memory
from localfeat.utils.errors import UserError
from tests.helpers.small import IMAGE_SIZE, RGB_IMAGE, backbone
from tests.helpers.whole_runs import draw_nothing, exported, metrics, small_run

SCALARS = 512  # bytes, of losses and means that are logged: more modules that are run, more of them
SIZE = 16
CASES = [(f, m) for f in ("swin", "vit", "convnext", "resnet") for m in ("feature_recon", "image_recon", "greedy_ce")]

QUICK = [("swin", "feature_recon", 2), ("vit", "image_recon", 3), ("convnext", "greedy_ce", 2)]


def cut(family: str, method: str, split: Any) -> Learner:
    return Learner(backbone(family), method, split, image_size=IMAGE_SIZE)


def true_peak(family: str, method: str, cuts: tuple[int, ...]) -> int:
    learner = cut(family, method, list(cuts))
    return step_memory(
        learner, batch_size=SIZE, image_size=IMAGE_SIZE, target="cuda", precision="32-true", source=RGB_IMAGE
    ).peak_bytes


def cuts_of(learner: Learner) -> tuple[int, ...]:
    lengths = learner.blocks_per_module
    return tuple(sum(lengths[: i + 1]) for i in range(len(lengths) - 1))


def check(family: str, method: str, modules: int) -> None:
    found = cuts_of(cut(family, method, BalancedSplit(modules, batch_size=SIZE)))
    blocks = 8 if family == "resnet" else 4
    peaks = {cuts: true_peak(family, method, cuts) for cuts in combinations(range(1, blocks), modules - 1)}
    assert len(found) == modules - 1
    assert peaks[found] - min(peaks.values()) <= SCALARS
    assert modules == blocks or max(peaks.values()) - min(peaks.values()) > SCALARS, "all divisions are alike"


@pytest.mark.parametrize(
    ("family", "method", "modules"),
    [
        pytest.param(*case, k, marks=[] if (*case, k) in QUICK else pytest.mark.slow)
        for case in CASES
        for k in (2, 3, 4)
        if case[0] != "resnet" or k == 2
    ],
)
def test_no_division_has_a_lower_peak(family: str, method: str, modules: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one is run on the meta device by the learner's own loop, to the byte."""
    monkeypatch.setattr("localfeat.memory.tracker.BLOCK_BYTES", 1)
    check(family, method, modules)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "modules"), [("feature_recon", 3), ("image_recon", 3), ("greedy_ce", 3), ("image_recon", 4)]
)
def test_no_division_of_eight_blocks_has_a_lower_peak(
    method: str, modules: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localfeat.memory.tracker.BLOCK_BYTES", 1)
    check("resnet", method, modules)


def test_the_given_backbone_and_random_numbers_stay() -> None:
    network = backbone("swin")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    plain = Learner(network, "greedy_ce", BalancedSplit(3, batch_size=SIZE))
    after = torch.get_rng_state()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    torch.set_rng_state(state)
    Learner(backbone_like(network), "greedy_ce", list(cuts_of(plain)))
    assert torch.equal(torch.get_rng_state(), after), "finding the cuts draws no random numbers"


def backbone_like(network: torch.nn.Module) -> torch.nn.Module:
    state = torch.get_rng_state()
    copy = backbone("swin")
    copy.load_state_dict(network.state_dict())
    torch.set_rng_state(state)
    return copy


def test_e2e_is_one_module() -> None:
    assert cut("swin", "e2e", BalancedSplit(3)).blocks_per_module == [4]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"k": 0}, "split.k=0: a network has at least 1 local module"),
        ({"batch_size": 0}, "split.batch_size=0: it must be at least 1"),
        ({"precision": "64"}, "split.precision=64: it is one of "),
        ({"device": "tpu"}, "split.device=tpu: it is one of cuda, cpu"),
        ({"k": 5}, "split.k=5: this backbone has 4 blocks, which is the most modules"),
    ],
)
def test_refusals(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        cut("swin", "feature_recon", BalancedSplit(**values))
    assert str(error.value).startswith(line)


@pytest.mark.slow
def test_a_run_writes_its_cuts_down_and_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)
    for name in ("first", "second"):
        small_run(tmp_path / name, "split=balanced", "split.k=3", "epochs=1")
    first, second = (yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("first", "second"))
    assert first["split"] == second["split"]
    assert len(first["split"]["cuts"]) == 2
    assert metrics(tmp_path / "first") == metrics(tmp_path / "second")
    ours, theirs = exported(tmp_path / "first"), exported(tmp_path / "second")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

"""What the planner says of an option against whole steps of the learner that it describes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from localfeat.backbones.bare import without_data
from localfeat.efficiency.settings import Efficiency
from localfeat.learner.module import Learner
from localfeat.memory.accounting import step_memory
from localfeat.memory.fitted import fitted
from localfeat.memory.planner import STEP, Option, Planner, Workload
from localfeat.methods.parts.decoders import as_decoder
from localfeat.methods.registry import as_method
from tests.helpers.small import IMAGE_SIZE, RGB_IMAGE, backbone

EFFICIENCIES = {
    "none": Efficiency(),
    "lean": Efficiency(fused_attention=True, loss_slices=4),
    "slices": Efficiency(fused_attention=True, loss_slices=4, recompute="checkpoint", slices=4),
}
SCALARS = 16 * 1024  # bytes: a few dozen losses and means, 512 each
MIB = 2**20


def planner(family: str, budget: float, efficiencies: dict[str, Efficiency] = EFFICIENCIES, **more: Any) -> Planner:
    work = Workload(
        backbone=lambda: without_data(backbone(family)),
        decoder=as_decoder("one_layer"),
        image_size=IMAGE_SIZE,
        source_bytes=3 * IMAGE_SIZE**2,
        **{"batch_size": 32, **more},
    )
    methods = {name: as_method(name) for name in ("e2e", "feature_recon")}
    return Planner(work, methods, efficiencies, int(budget))


def true_peak(family: str, option: Option, batch: int, **more: Any) -> int:
    learner = Learner(
        backbone(family),
        option.method,
        list(option.cuts) or 1,
        efficiency=option.settings,
        image_size=IMAGE_SIZE,
    )
    values = {"target": "cuda", "precision": "32-true", "source": RGB_IMAGE, **more}
    return step_memory(learner, batch_size=batch, image_size=IMAGE_SIZE, **values).peak_bytes


def some(options: list[Option]) -> list[Option]:
    """One of every method and setting."""
    return list({(option.method, option.efficiency): option for option in options}.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit"])
def test_peaks_and_largest_batches(family: str) -> None:
    found = planner(family, 40 * MIB)
    options = list(found.options())
    assert {option.modules for option in options} == {1, 2, 3, 4}
    for option in some(options):
        assert option.peak_bytes == pytest.approx(true_peak(family, option, 32), abs=SCALARS)
        assert option.fits == (option.peak_bytes <= found.budget)
        exact = found.exactly(option).largest_batch
        assert exact % STEP == 0
        assert true_peak(family, option, exact) <= found.budget + SCALARS
        assert true_peak(family, option, exact + STEP) > found.budget - SCALARS


@pytest.mark.slow
def test_options_that_are_fitted_fit_and_cost_no_more() -> None:
    whole = next(o for o in planner("swin", 2**40).options() if o.method == "e2e" and o.efficiency == "none")
    found = planner("swin", 0.8 * whole.peak_bytes)
    options = list(found.options())
    fitting = list(fitted(found))
    assert fitting
    for option in fitting:
        assert option.fits
        assert true_peak("swin", option, 32) <= found.budget + SCALARS
        rivals = [o.step_cost for o in options if o.method == option.method and o.efficiency == "slices" and o.fits]
        assert option.step_cost <= min(rivals) + 1e-9


@pytest.mark.parametrize("batch", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 0))])
def test_small_budgets(batch: int) -> None:
    known = next(o for o in planner("vit", 2**40).options() if o.efficiency == "none" and o.modules == 2)
    budget = true_peak("vit", known, batch) + 2 * SCALARS if batch else MIB
    option = next(o for o in planner("vit", budget).options() if o.efficiency == "none" and o.cuts == known.cuts)
    assert not option.fits
    assert option.largest_batch == batch


def test_settings_that_a_backbone_refuses_are_left_out() -> None:
    """Batch normalisation needs the whole batch: no slices."""
    found = planner("resnet", 2**40)
    assert {option.efficiency for option in found.options(modules=2)} == {"none", "lean"}
    assert list(fitted(found)) == []


@pytest.mark.parametrize(("accumulate", "ema"), [(2, False), (1, True)])
def test_what_stands_between_steps(accumulate: int, ema: bool) -> None:
    """Gradients that pile up are counted twice for one piece at most; an average exactly."""
    found = planner("swin", 2**40, {"none": Efficiency()}, accumulate=accumulate, ema=ema, batch_size=128)
    for option in found.options(modules=3):
        truth = true_peak("swin", option, 128, accumulate=accumulate, ema=ema)
        assert truth - SCALARS <= option.peak_bytes <= (1.05 if accumulate > 1 else 1) * truth + SCALARS


def test_exactly_mends_a_wrong_guess() -> None:
    found = planner("vit", 30 * MIB, {"none": Efficiency()})
    option = found.exactly(next(found.options(modules=2)))
    for wrong in (STEP, option.largest_batch // 16 * STEP, 3 * option.largest_batch):
        assert found.exactly(replace(option, largest_batch=wrong)).largest_batch == option.largest_batch

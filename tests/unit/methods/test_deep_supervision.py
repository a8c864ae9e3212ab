"""``detach=False``: the local losses of a method train the whole network at once, as its control."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from localfeat.efficiency.settings import Efficiency
from localfeat.methods.local_module import weighted_sum
from localfeat.methods.registry import METHODS, as_method
from localfeat.utils.errors import UserError
from tests.helpers.small import LOCAL_METHODS, Metrics, batch, gradients, learner, loader, trainer

FAMILIES = ["swin", "vit", "resnet"]


def control(method: str, **more: Any) -> Any:
    return learner(as_method(method, detach=False), more.pop("split", 4), **more)


@pytest.mark.parametrize(
    ("method", "family"), [(m, "swin") for m in LOCAL_METHODS] + [("auglocal", f) for f in FAMILIES[1:]]
)
def test_the_loss_and_its_gradients_are_those_of_a_loop_without_detach(method: str, family: str) -> None:
    own, parts = control(method, family=family), learner(as_method(method), 4, family)
    images, labels = batch(8)
    output = own.local_modules[0](images, images, labels)
    output.loss.backward()
    x, losses = images, []
    for module in parts.local_modules:
        objective = module.objective
        with objective.watch():
            inputs, x = module.body(x)
        terms, logits = objective(inputs.detach(), x, images, labels)
        losses.append(weighted_sum({**terms, **objective.watched_terms()}, objective.weights))
    sum(losses).backward()
    torch.testing.assert_close(output.loss, sum(losses))
    torch.testing.assert_close(output.logits, logits.detach())
    found, expected = gradients(own.backbone), gradients(parts.backbone)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_the_last_loss_reaches_the_first_block() -> None:
    model = control("feature_recon_ce")
    images, labels = batch(8)
    module = model.local_modules[0]
    module.objective.weights = {name: float(name == "cross_entropy") for name in module.objective.weights}
    module(images, images, labels).loss.backward()
    assert float(module.stem.proj.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("method", LOCAL_METHODS)
def test_every_method_trains_without_cuts(method: str) -> None:
    metrics, model = Metrics(), control(method)
    trainer(metrics).fit(model, loader(2))
    names = {name.rsplit("/")[-1] for name in metrics.steps[0] if name.startswith("train/module_1/")}
    assert {"cross_entropy", "loss"} <= names and len(names) >= 5
    assert len(model.local_modules) == 1
    assert model.local_modules[0].objective._features == {}


@pytest.mark.parametrize("efficiency", [{"recompute": "checkpoint"}, {"recompute": "selective"}, {"loss_slices": 2}])
def test_efficiency_changes_no_gradient(efficiency: dict[str, Any]) -> None:
    found = []
    for settings in ({}, efficiency):
        model = control("feature_recon_ce", efficiency=Efficiency(**settings))
        images, labels = batch(8)
        model.local_modules[0](images, images, labels).loss.backward()
        found.append(gradients(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_evaluation_keeps_no_features() -> None:
    model = control("feature_recon_ce").eval()
    with torch.no_grad():
        assert torch.equal(model(batch()[0]), model.backbone(batch()[0]))
    assert model.local_modules[0].objective._features == {}


def test_names() -> None:
    assert METHODS["deep_supervision"] == as_method("feature_recon_ce", name="deep_supervision", detach=False)
    assert not METHODS["e2e"].joint and not METHODS["e2e"].local
    with pytest.raises(UserError, match=r"method.detach=true: end-to-end training has no cuts"):
        as_method("e2e", detach=True)

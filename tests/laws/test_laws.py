"""The laws of the design, one group of tests each: law n is ``test_law_n_*`` (6 and 7 are about whole runs: test_run).

``python -m tests.laws.break_the_laws`` breaks the code on purpose and demands that these tests notice.
"""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from localfeat.learner.module import Learner
from localfeat.methods.registry import METHODS
from tests.helpers.small import (
    CLASSES,
    FAMILIES,
    IMAGE_SIZE,
    LOCAL_METHODS,
    SPLIT_BACKBONES,
    AtStep,
    Metrics,
    backbone,
    batch,
    disturbed,
    gradients,
    learner,
    loader,
    settings,
    trainer,
)
from tests.laws import golden

each_network = pytest.mark.parametrize("family", SPLIT_BACKBONES)
each_local_method = pytest.mark.parametrize("method", LOCAL_METHODS)


def local_run(model: Learner, images: Tensor, labels: Tensor) -> list[Any]:
    """All modules forward, one after the other, nothing freed."""
    outputs, features = [], images
    for module in model.local_modules:
        outputs.append(module(features, images, labels))
        features = outputs[-1].features
    return outputs


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that are not merely kept."""
    return [p for p in module.parameters() if p.requires_grad]


# --- law 1: no gradient crosses a cut ---


@pytest.mark.parametrize(("method", "split", "family"), settings(LOCAL_METHODS))
def test_law_1_no_loss_has_a_gradient_in_another_module(method: str, split: Any, family: str) -> None:
    model = learner(method, split, family)
    disturbed(model)
    parameters = [trained(module) for module in model.local_modules]
    for number, output in enumerate(local_run(model, *batch())):
        assert not output.features.requires_grad
        for other, theirs in enumerate(parameters):
            found = torch.autograd.grad(output.loss, theirs, allow_unused=True, retain_graph=True)
            if other == number:
                assert all(g is not None and g.abs().max() > 0 for g in found)
            else:
                assert all(g is None for g in found)


@pytest.mark.parametrize(
    ("method", "family", "only"),
    [(method, "vit", 1) for method in LOCAL_METHODS]
    + [("feature_recon", family, number) for family in ("swin", "convnext") for number in range(4)],
)
def test_law_1_in_a_trainer_one_loss_moves_one_module(method: str, family: str, only: int) -> None:
    """Every loss but one is multiplied by zero: all gradients but that module's are exactly zero at every step."""
    model = learner(method, 4, family)
    for number, module in enumerate(model.local_modules):
        if number != only:
            module.objective.weights = dict.fromkeys(module.objective.weights, 0.0)
    largest: dict[int, float] = {}

    def look(_: Any, number: int) -> None:
        for other, module in enumerate(model.local_modules):
            top = max(float(gradient.abs().max()) for gradient in gradients(module).values())
            largest[other] = max(largest.get(other, 0.0), top)
            assert other == number or top == 0

    trainer(AtStep(look)).fit(model, loader(1))
    assert {number: value > 0 for number, value in largest.items()} == {n: n == only for n in range(4)}


# --- law 2: at most one module's graph is alive: tests/laws/test_law_2.py ---

# --- law 3: every term reaches every parameter it should ---

BODY = ("stem.", "blocks.")
HEAD = (*BODY, "objective.auxiliary.", "objective.tail.", "objective.head.", "objective.fc.")
REACHED = {
    "contrast": HEAD,
    "cross_entropy": HEAD,
    "reconstruction": (*BODY, *(f"objective.{part}." for part in ("auxiliary", "decoder", "norm", "down", "up"))),
    "similarity": (*BODY, "objective.conv."),
    "transport": BODY,
}


def weighted_gradients(module: nn.Module, inputs: tuple[Tensor, ...], weights: dict[str, float]) -> dict[str, Tensor]:
    module.zero_grad()
    before, module.objective.weights = module.objective.weights, weights
    module(*inputs).loss.backward()
    module.objective.weights = before
    return gradients(module)


def module_inputs(model: Learner, size: int = 8) -> list[tuple[Tensor, ...]]:
    images, labels = batch(size)
    features = [images, *(output.features for output in local_run(model, images, labels))]
    return [(x, images, labels) for x in features[:-1]]


SEPARATE = [name for name, method in METHODS.items() if not method.joint]


@pytest.mark.parametrize(("method", "split", "family"), settings(SEPARATE))
def test_law_3_every_term_alone_reaches_what_it_should(method: str, split: Any, family: str) -> None:
    model = learner(method, split, family)
    disturbed(model)
    for module, inputs in zip(model.local_modules, module_inputs(model), strict=True):
        terms = module.objective.weights
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        assert all(weight > 0 for weight in terms.values())
        for term in terms:
            found = weighted_gradients(module, inputs, {name: float(name == term) for name in terms})
            for name, gradient in found.items():
                if term in REACHED or name.startswith(BODY):  # of terms of your own only the body's gradient is known
                    reached = name.startswith(REACHED.get(term, BODY)) and name not in frozen
                    assert bool(gradient.abs().max() > 0) == reached, (term, name)


@each_network
@pytest.mark.parametrize("decoder", ["interp", "one_layer", "deconv"])
@pytest.mark.parametrize("method", ["image_recon", "feature_recon"])
def test_law_3_gradients_are_the_weighted_sum_of_the_terms(method: str, decoder: str, family: str) -> None:
    model = learner(method, 4, family, decoder=decoder)
    disturbed(model.backbone)
    for module, inputs in list(zip(model.local_modules, module_inputs(model), strict=True))[:-1]:
        own = module.objective.weights
        alone = {term: weighted_gradients(module, inputs, {t: float(t == term) for t in own}) for term in own}
        for weights in (own, {"contrast": 5.0, "reconstruction": 0.5}):
            for name, total in weighted_gradients(module, inputs, weights).items():
                expected = sum(weights[term] * alone[term][name] for term in own)
                torch.testing.assert_close(total, expected, rtol=1e-3, atol=float(expected.abs().max()) * 1e-4)


@each_network
@pytest.mark.parametrize("method", METHODS)
def test_law_3_in_a_trainer_every_parameter_moves(method: str, family: str) -> None:
    model = learner(method, 4, family, decoder="deconv")
    before = copy.deepcopy(model.state_dict())
    trainer().fit(model, loader(2))
    still = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert not still


@each_local_method
def test_law_3_the_logged_loss_is_the_weighted_sum_of_the_logged_terms(method: str) -> None:
    metrics, model = Metrics(), learner(method, 4)
    trainer(metrics).fit(model, loader(2))
    for step in metrics.steps:
        for number, module in enumerate(model.local_modules, start=1):
            term = {name.rsplit("/")[-1]: v for name, v in step.items() if name.startswith(f"train/module_{number}/")}
            loss, weights = term.pop("loss"), module.objective.weights
            assert term.keys() == weights.keys()
            assert loss == pytest.approx(sum(weights[name] * value for name, value in term.items()), rel=1e-5)
        assert step["train/module_4/cross_entropy"] == step["train/loss"]


RECON_CE = [{"cross_entropy": 1, "reconstruction": 3}, {"cross_entropy": 3, "reconstruction": 1}]
WEIGHTS: dict[str, list[Any]] = {  # of the first and of the last local module, and of the last module
    "feature_recon": [{"contrast": 1, "reconstruction": 3}, {"contrast": 3, "reconstruction": 1}, {"cross_entropy": 1}],
    "feature_recon_ce": [*RECON_CE, {"cross_entropy": 1}],
    "greedy_ce": [{"cross_entropy": 1}] * 3,
    "trgl": [{"cross_entropy": 1, "transport": 1 / 20}] * 3,
    "predsim": [*[{"cross_entropy": 0.01, "similarity": 0.99}] * 2, {"cross_entropy": 0.01}],
    "lopt": [*[{"reconstruction": 10}] * 2, {"cross_entropy": 1}],
}


@pytest.mark.parametrize("method", WEIGHTS)
def test_law_3_weights_are_those_of_the_papers(method: str) -> None:
    found = [module.objective.weights for module in learner(method, 4).local_modules]
    for weights, wanted in zip([found[0], *found[2:]], WEIGHTS[method], strict=True):
        assert weights == pytest.approx(wanted)


# --- law 4: the trained body is a plain timm model ---


@pytest.mark.parametrize(
    ("method", "family"),
    [(method, "swin") for method in METHODS] + [("feature_recon", family) for family in FAMILIES if family != "swin"],
)
def test_law_4_exported_weights_give_the_same_logits_in_timm(method: str, family: str) -> None:
    model = learner(method, 4, family)
    start = copy.deepcopy(model.backbone.state_dict())
    trainer().fit(model, loader(2))
    name, arguments = FAMILIES[family]
    sized = {} if family in ("convnext", "resnet") else {"img_size": IMAGE_SIZE}
    plain = timm.create_model(name, num_classes=CLASSES, **sized, **arguments)
    exported = model.backbone.state_dict()
    plain.load_state_dict(exported, strict=True)
    assert not [key for key, value in plain.named_parameters() if torch.equal(value, start[key])]
    images, _ = batch()
    with torch.no_grad():
        logits = model.eval()(images)
        assert torch.equal(plain.eval()(images), logits)
        assert torch.equal(model.backbone(images), logits)


@each_network
def test_law_4_validation_is_the_plain_models(family: str) -> None:
    model = learner("feature_recon", 4, family)
    plain = copy.deepcopy(model.backbone).eval()
    data = loader(3)
    measured = trainer().validate(model, data, verbose=False)[0]
    images, labels = data.dataset.tensors
    with torch.no_grad():
        logits = plain(images)
    assert measured["val/loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert measured["val/accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


# --- law 5: e2e is a plain PyTorch loop ---


def plain_loop(network: nn.Module, data: Any, epochs: int, recipe: dict[str, Any]) -> list[tuple[float, float]]:
    """Losses and accuracies of ordinary training: AdamW, linear warm-up and cosine, clipping."""
    undecayed = network.no_weight_decay() if hasattr(network, "no_weight_decay") else set()
    plain = [p for name, p in network.named_parameters() if p.ndim <= 1 or name in undecayed]
    rest = [p for name, p in network.named_parameters() if p.ndim > 1 and name not in undecayed]
    groups = [{"params": rest, "weight_decay": recipe["weight_decay"]}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=recipe["betas"], eps=recipe["eps"])
    total = epochs * len(data)
    warmup = round(recipe["warmup"] * total)
    results, step = [], 0
    network.train()
    for _ in range(epochs):
        for index, (images, labels) in enumerate(data):
            torch.manual_seed(index)
            final = recipe["final_lr"]
            cosine = final + (1 - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
            for group in optimizer.param_groups:
                group["lr"] = recipe["lr"] * ((step + 1) / (warmup + 1) if step < warmup else cosine)
            logits = network(images)
            loss = nn.functional.cross_entropy(logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), recipe["gradient_clip"])
            optimizer.step()
            optimizer.zero_grad()
            results.append((loss.item(), float((logits.argmax(1) == labels).float().mean())))
            step += 1
    return results


@pytest.mark.parametrize("family", FAMILIES)
def test_law_5_e2e_is_a_plain_loop_loss_for_loss(family: str) -> None:
    recipe = {
        "lr": 3e-3,
        "weight_decay": 0.3,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "warmup": 0.25,
        "final_lr": 0.1,
        "gradient_clip": 0.5,
    }
    model = learner("e2e", 4, family, drop_path_rate=0.2, **recipe)
    network = copy.deepcopy(model.backbone)
    metrics = Metrics()
    trainer(metrics, max_epochs=2).fit(model, loader(4), loader(1))
    expected = plain_loop(network, loader(4), 2, recipe)
    assert [(step["train/loss"], step["train/accuracy"]) for step in metrics.steps] == [
        (pytest.approx(loss, rel=1e-6), accuracy) for loss, accuracy in expected
    ]
    for name, p in network.named_parameters():
        torch.testing.assert_close(
            model.backbone.get_parameter(name), p, rtol=1e-4, atol=1e-5
        )  # summed in another order


# --- law 8: losses at a fixed seed stay the same ---


@pytest.mark.parametrize("case", golden.CASES)
def test_law_8_losses_are_the_recorded_ones(case: str) -> None:
    recorded = json.loads(golden.FILE.read_text())[case]
    assert golden.losses(case) == [pytest.approx(step, rel=1e-4) for step in recorded]


@pytest.mark.parametrize("method", METHODS)
def test_law_8_every_method_is_recorded(method: str) -> None:
    own = [case for case in golden.CASES if case.split()[0] == method]
    assert own and set(own) <= set(json.loads(golden.FILE.read_text()))


def test_law_8_the_same_seed_gives_the_same_losses_again() -> None:
    """Bit for bit, on one machine."""
    assert golden.losses("feature_recon k4 one_layer") == golden.losses("feature_recon k4 one_layer")
    assert backbone(seed=1).head.fc.weight.ne(backbone(seed=2).head.fc.weight).any()

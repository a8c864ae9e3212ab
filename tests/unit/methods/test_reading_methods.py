"""readout, lookahead, man: what they copy and read of later modules, against those themselves."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from localfeat.methods.objectives.averaged import TwoCopies
from localfeat.methods.registry import as_method
from tests.helpers.small import batch, disturbed, learner

each_family = pytest.mark.parametrize("family", ["swin", "vit", "resnet"])


@each_family
@pytest.mark.parametrize("method", ["readout", "lookahead"])
def test_the_loss_is_that_of_the_later_blocks_and_the_classifier(method: str, family: str) -> None:
    """Forward and gradient, with all blocks above: copies begin at their weights."""
    model = learner(as_method(method, depth=99), 2, family)
    images, labels = batch()
    first, second = model.local_modules
    output = first(images, images, labels)
    x = first.blocks(first.stem(images))
    for block in second.blocks:
        x = block(x)
    expected = F.cross_entropy(second.objective.tail(x), labels, label_smoothing=0.1)
    torch.testing.assert_close(output.loss, expected)
    body = list(first.blocks.parameters())
    found, wanted = torch.autograd.grad(output.loss, body), torch.autograd.grad(expected, body)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@each_family
def test_lookahead_adds_no_parameters_and_follows_the_network(family: str) -> None:
    model = learner("lookahead", 4, family)
    assert all(not list(module.objective.parameters()) for module in model.local_modules[:-1])
    images, labels = batch()
    before = model.local_modules[0](images, images, labels).loss
    disturbed(model.local_modules[-1].objective.tail)
    assert model.local_modules[0](images, images, labels).loss != before


@each_family
def test_readout_trains_its_copies_and_not_the_classifier(family: str) -> None:
    model = learner("readout", 2, family)
    images, labels = batch()
    first, last = model.local_modules
    first(images, images, labels).loss.backward()
    assert all(p.grad is None for p in [*last.parameters()])
    assert any(p.grad is not None and p.grad.any() for p in first.objective.parameters())
    classifier = {id(p) for p in last.objective.tail.parameters()}
    assert not classifier & {id(p) for p in first.objective.parameters()}


def test_man_s_average_of_the_card() -> None:
    block = torch.nn.Linear(1, 1, bias=False).double()
    start = torch.tensor(1.0, dtype=torch.float64).sin()
    with torch.no_grad():
        block.weight.fill_(start)
    copies = TwoCopies(block, 0.995, learned=False)
    with torch.no_grad():
        block.weight.add_(0.5)
    for _ in range(3):
        copies.update()
    assert float(copies.average.weight) == pytest.approx(0.8489335473, rel=1e-9)
    assert float(copies.copy.weight) == float(start)


@each_family
@pytest.mark.parametrize("method", ["man", "man_plus"])
def test_man_s_loss_written_out(method: str, family: str) -> None:
    model = learner(method, 2, family)
    images, labels = batch()
    first = model.local_modules[0]
    copies, head = first.objective.head
    with torch.no_grad():
        for parameter in copies.average.parameters():
            parameter += 0.01
        if method == "man_plus":
            copies.share.fill_(1.3)
    one, other = copy.deepcopy(copies.copy), copy.deepcopy(copies.average)
    share = 1.3 if method == "man_plus" else 1.0
    output = first(images, images, labels)
    x = first.blocks(first.stem(images))
    mixed = share * one(x) + (2 - share) * other(x)
    logits = head.fc(head.norm(head.shape.to_nhwc(mixed)).mean((1, 2)))
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(output.loss, expected)
    body = list(first.blocks.parameters())
    found, wanted = torch.autograd.grad(output.loss, body, retain_graph=True), torch.autograd.grad(expected, body)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    if method == "man_plus":
        (slope,) = torch.autograd.grad(output.loss, [copies.share])
        assert slope.isfinite() and slope != 0
    assert not any(p.requires_grad for p in copies.average.parameters())


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_man_s_average_follows_weights_and_statistics_once_a_step(family: str) -> None:
    model = learner("man", 2, family)
    images, labels = batch(8)
    copies = model.local_modules[0].objective.head[0]
    block = model.local_modules[1].blocks[0]
    disturbed(block)
    before = {name: value.clone() for name, value in copies.average.state_dict().items()}
    now = {name: value.clone() for name, value in block.state_dict().items()}
    model.train_modules(lambda: (images, labels), lambda loss: loss.backward(), lambda number: None)
    model.local_modules[0].objective.after_step()
    for name, value in copies.average.state_dict().items():
        if value.is_floating_point() and "running" not in name:
            torch.testing.assert_close(value, 0.995 * before[name] + 0.005 * now[name])
        elif "running" in name:
            assert not torch.equal(value, before[name])

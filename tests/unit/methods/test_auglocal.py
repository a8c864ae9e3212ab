"""auglocal: the numbers of its card, and its copies against the network's own blocks."""

from __future__ import annotations

import pytest
import torch

from localfeat.learner.optimization import undecayed_parameters
from localfeat.methods.auglocal import AugLocal
from localfeat.methods.parts.above import ReadOnly, copied, picked
from tests.helpers.small import backbone, batch, disturbed, learner


def test_numbers_of_the_card() -> None:
    assert picked(12, 2, 2) == [6, 11]
    assert picked(12, 2, 3) == [5, 8, 11]
    assert picked(16, 0, 3) == [5, 10, 15]
    assert [AugLocal(depth=3).depth_at(m, 4) for m in range(3)] == [3, 2, 2]
    assert [AugLocal(depth=6).depth_at(m, 12) for m in range(11)] == [6, 6, 6, 5, 5, 5, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("family", ["swin", "vit", "resnet"])
def test_the_loss_is_that_of_the_later_blocks_themselves(family: str) -> None:
    """Forward and gradient: the copies begin at the weights of the blocks, here all of those above."""
    model = learner(AugLocal(depth=99, label_smoothing=0.0), 2, family)
    images, labels = batch()
    first, second = model.local_modules
    output = first(images, images, labels)
    head = first.objective.head[-1]
    x = first.blocks(first.stem(images))
    for block in second.blocks:
        x = block(x)
    logits = head.fc(head.norm(head.shape.to_nhwc(x)).mean((1, 2)))
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(output.loss, expected)
    copies = [p for module in first.objective.head[:-1] for p in module.parameters()]
    originals = list(second.blocks.parameters())
    assert {id(p) for p in copies}.isdisjoint(map(id, originals))
    body = list(first.blocks.parameters())
    found = torch.autograd.grad(output.loss, [*body, *copies])
    torch.testing.assert_close(found, torch.autograd.grad(expected, [*body, *originals]), rtol=1e-3, atol=1e-5)


def test_position_tables_of_copies_do_not_decay() -> None:
    model = learner("auglocal", 2, "swin")
    undecayed = undecayed_parameters(model.backbone, model.local_modules)
    tables = [p for n, p in model.local_modules.named_parameters() if n.endswith("relative_position_bias_table")]
    assert len(tables) > 4 and all(id(p) in undecayed for p in tables)


@pytest.mark.parametrize("family", ["swin", "vit", "resnet"])
def test_a_copied_classifier_drags_no_backbone_along_and_a_read_one_gets_no_gradient(family: str) -> None:
    model = learner("auglocal", 2, family)
    disturbed(model.backbone)
    tail = model.local_modules[-1].objective.tail
    x = torch.randn_like(model.local_modules[0](*batch()[:1] * 2, batch()[1]).features).requires_grad_()
    x = torch.randn(8, *model.local_modules[1].blocks(x).shape[1:], requires_grad=True)
    own, read = copied(tail), ReadOnly(tail)
    torch.testing.assert_close(own(x), tail(x))
    torch.testing.assert_close(read(x), tail(x))
    assert len(list(own.parameters())) == len(list(tail.parameters())) < len(list(backbone(family).parameters()))
    assert not {id(p) for p in own.parameters()} & {id(p) for p in model.backbone.parameters()}
    read(x).sum().backward()
    assert all(p.grad is None for p in tail.parameters()) and x.grad is not None

"""A decoder beside any head: the sum of both losses, each reaching what it should."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from localfeat.efficiency.settings import Efficiency
from localfeat.learner.module import Learner
from localfeat.methods.objective import HeadObjective, Objective
from localfeat.methods.parts.heads import NormMeanLinear
from localfeat.methods.registry import METHODS, as_method
from localfeat.methods.site import Site
from localfeat.methods.supervised import Supervised
from localfeat.utils.errors import UserError
from tests.helpers.small import batch, gradients, learner, loader, trainer

SUPERVISED = [name for name, method in METHODS.items() if isinstance(method, Supervised)]
each_method = pytest.mark.parametrize("method", SUPERVISED)


def with_decoder(method: str, reconstruct: str = "features", **changes: Any) -> Learner:
    efficiency = Efficiency(loss_slices=changes.pop("loss_slices", 1))
    return learner(as_method(method, reconstruct=reconstruct, **changes), 4, efficiency=efficiency)


def module_and_gradients(model: Learner, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms and gradients of one module's loss; the modules before it run without gradients."""
    images, labels = batch(8)
    x = images
    for module in model.local_modules[:index]:
        x = module(x, images, labels).features
    output = model.local_modules[index](x, images, labels)
    output.loss.backward()
    return {**output.terms, "loss": output.loss.detach()}, gradients(model.local_modules[index])


def test_every_head_can_have_one() -> None:
    heads = ["auglocal", "dgl", "greedy_linear", "lookahead", "man", "man_plus", "predsim", "readout", "trgl"]
    assert sorted(SUPERVISED) == heads


@each_method
@pytest.mark.parametrize("reconstruct", ["features", "image"])
def test_the_loss_is_the_heads_and_the_decoders_written_out(method: str, reconstruct: str) -> None:
    model = with_decoder(method, reconstruct, supervision_weight=(1.0, 3.0))
    images, labels = batch(8)
    first, module = model.local_modules[:2]
    z = first(images, images, labels).features
    output = module(z, images, labels)
    objective = module.objective
    with objective.head.watch():
        _, h = module.body(z)
    head, _ = objective.head(z, h, images, labels)
    head |= objective.head.watched_terms()
    maps = F.layer_norm(h, h.shape[-1:], objective.auxiliary.norm.weight, objective.auxiliary.norm.bias)
    conv, project = objective.auxiliary.conv, objective.decoder[0]
    maps = F.gelu(F.conv2d(maps.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1))
    rebuilt = F.pixel_shuffle(F.conv2d(maps, project.weight, project.bias), objective.decoder[1].upscale_factor)
    target = F.layer_norm(z, z.shape[-1:]).permute(0, 3, 1, 2) if reconstruct == "features" else images
    alone = learner(method, 4).local_modules[1].objective.weights
    expected = 2 * (rebuilt - target).square().mean() + 2 * sum(alone[name] * value for name, value in head.items())
    torch.testing.assert_close(output.loss, expected)
    own = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(output.loss, own, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, own, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert objective.uses_images == (reconstruct == "image")


@each_method
def test_slices_of_the_batch_change_no_gradient(method: str) -> None:
    plain, sliced = (module_and_gradients(with_decoder(method, loss_slices=n), 0) for n in (1, 2))
    for found, expected in zip(sliced, plain, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


@each_method
def test_a_decoder_trains_and_leaves_no_gradient_above_its_module(method: str) -> None:
    model = with_decoder(method)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer().fit(model, loader(2))
    assert not [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    module_and_gradients(model, 1)
    assert all(p.grad is None for module in model.local_modules[2:] for p in module.parameters())


def test_averages_are_updated_beside_a_decoder() -> None:
    model = with_decoder("man", momentum=0.5)
    average = model.local_modules[0].objective.head.head[0].average
    before = {name: value.clone() for name, value in average.state_dict().items()}
    trainer().fit(model, loader(2))
    assert any(not torch.equal(value, before[name]) for name, value in average.state_dict().items())


def test_wrong_values_are_refused_in_one_line() -> None:
    for changes, line in (
        ({"reconstruct": "input"}, "method.reconstruct=input: it is one of null, image, features"),
        ({"supervision_weight": (1.0,)}, r"method.supervision_weight=\[1.0\]: two weights"),
        ({"width": 0}, "method.width=0: it must be above 0"),
    ):
        with pytest.raises(UserError, match=line):
            as_method("auglocal", **changes)


class Noting(HeadObjective):
    """Keeps what passes, as an objective of a user's own may."""

    def passed(self, blocks: int, features: Tensor) -> None:
        self.noted = [*([] if blocks == 0 else self.noted), (blocks, tuple(features.shape))]


@dataclass(frozen=True)
class Own(Supervised):
    name: str = "own"

    def supervise(self, site: Site) -> Objective:
        return Noting(NormMeanLinear(site.outputs, site.num_classes), 0.0)


@pytest.mark.parametrize("reconstruct", [None, "features"])
def test_an_objective_of_ones_own_notes_what_passes(reconstruct: str | None) -> None:
    seen = []
    for detach in (True, False):
        model = learner(Own(reconstruct=reconstruct, detach=detach), [1, 3])
        model.train_modules(lambda: batch(4), Tensor.backward, lambda index: None)
        own = [m.objective for m in model.local_modules] if detach else [*model.local_modules[0].objective.objectives]
        seen.append([(o if reconstruct is None else o.head).noted for o in own[:2]])
    assert seen[0] == seen[1]
    assert [[blocks for blocks, _ in noted] for noted in seen[0]] == [[0, 1], [0, 1, 2]]

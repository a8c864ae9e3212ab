"""greedy_linear against its formula, written out."""

from __future__ import annotations

import torch

from localfeat.backbones.layout import FeatureShape
from localfeat.methods.parts.decoders import OneLayerDecoder
from localfeat.methods.registry import METHODS
from localfeat.methods.site import Site


def test_loss_and_gradient_are_the_formulas() -> None:
    site = Site(0, 2, FeatureShape("NHWC", 3, 4, 4), FeatureShape("NHWC", 6, 2, 2), (8, 8), 3)
    objective = METHODS["greedy_linear"].build(site, OneLayerDecoder).double()
    h = (torch.arange(4 * 2 * 2 * 6, dtype=torch.float64) + 1).sin().reshape(4, 2, 2, 6).requires_grad_()
    labels, norm, fc = torch.tensor([0, 1, 1, 2]), objective.head.norm, objective.head.fc
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 6))
    terms, logits = objective(h, h, None, labels)
    assert logits is None and objective.weights == {"cross_entropy": 1.0}

    normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    scores = (normed * norm.weight + norm.bias).mean((1, 2)) @ fc.weight.T + fc.bias
    log_probability = scores - scores.exp().sum(1, keepdim=True).log()
    expected = -(0.9 * log_probability[range(4), labels] + 0.1 * log_probability.mean(1)).mean()
    torch.testing.assert_close(terms["cross_entropy"].double(), expected, rtol=1e-6, atol=0)
    parameters = [h, *objective.parameters()]
    found = torch.autograd.grad(terms["cross_entropy"], parameters)
    torch.testing.assert_close(found, torch.autograd.grad(expected, parameters), rtol=1e-5, atol=1e-7)

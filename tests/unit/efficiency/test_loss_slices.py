"""Auxiliary features and their loss in slices of the batch compared with plain ones: values, gradients, memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localfeat.backbones.layout import FeatureShape
from localfeat.efficiency.loss_slices import pooled_and_loss
from localfeat.efficiency.settings import Efficiency
from localfeat.memory.tracker import StorageTracker
from localfeat.methods.head_and_decoder import HeadAndDecoder
from localfeat.methods.local_module import weighted_sum
from localfeat.methods.objectives.reconstruction import LocalObjective
from localfeat.methods.parts.decoders import DECODERS
from localfeat.methods.parts.losses import RECONSTRUCTION_LOSSES, mse
from localfeat.methods.site import Site
from localfeat.utils.errors import UserError
from tests.helpers.small import LOCAL_METHODS, SPLIT_BACKBONES, batch, gradients, learner, loader, trainer

IMAGES = 6
WIDTH = 8
LABELS = torch.arange(IMAGES) % 3
INPUTS, OUTPUTS = FeatureShape("NHWC", 6, 8, 8), FeatureShape("NHWC", 12, 4, 4)


@pytest.fixture(autouse=True)
def slices_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give small batches as many slices as large ones."""
    monkeypatch.setattr("localfeat.methods.objectives.reconstruction.IMAGES_PER_SLICE", 1)


def test_slices_have_four_images_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    objective = learner("feature_recon", 2, efficiency=Efficiency(loss_slices=8)).local_modules[0].objective
    assert [objective._slices(images) for images in (1, 7, 8, 31, 32, 128)] == [1, 1, 2, 7, 8, 8]


def objective(
    target: str | None = "image", loss: str = "bce", decoder: Any = "interp", slices: int = 1, **changes: Any
) -> LocalObjective:
    torch.manual_seed(0)
    site = Site(0, 4, INPUTS, OUTPUTS, image_size=(16, 16), num_classes=5, loss_slices=slices)
    settings = {"reconstruct": target, "reconstruction_loss": loss, "width": WIDTH, "projection_dim": 8, **changes}
    method = HeadAndDecoder("own", **settings)
    found = method.build(site, DECODERS.get(decoder, decoder))
    assert isinstance(found, LocalObjective)
    return found


def batch_of(images: int = IMAGES) -> tuple[Tensor, Tensor, Tensor]:
    """Return a module's input and output features and its images."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((8, 8, 6), (4, 4, 12), (3, 16, 16))
    inputs, outputs, pictures = (torch.randn(images, *shape, generator=generator) for shape in shapes)
    return inputs, outputs, pictures


def outcome(own: LocalObjective, images: int = IMAGES, autocast: bool = False) -> dict[str, Tensor]:
    """Return the terms and all gradients of their weighted sum; the backward pass runs outside autocast."""
    inputs, outputs, pictures = batch_of(images)
    outputs.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms, _ = own(inputs, outputs, pictures, torch.arange(images) % 3)
        loss = sum((0.7 + 1.8 * number) * term for number, term in enumerate(terms.values()))
    loss.backward()
    assert outputs.grad is not None and all(term.dtype == torch.float32 for term in terms.values())
    return {**{k: v.detach() for k, v in terms.items()}, "outputs": outputs.grad, **gradients(own)}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        assert value.abs().sum() > 0, name
        assert float((found[name] - value).norm() / value.norm()) < tolerance, name


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("target", ["image", "features"])
@pytest.mark.parametrize("loss", RECONSTRUCTION_LOSSES)
def test_loss_and_every_gradient_are_those_of_the_whole_batch(loss: str, target: str, decoder: str) -> None:
    expected = outcome(objective(target, loss, decoder))
    for slices in (2, 4, 6, 50):  # 4: slices of one and of two images; 50: one image each
        assert_near(outcome(objective(target, loss, decoder, slices)), expected, 1e-5)


@pytest.mark.parametrize("supervision", ["contrast", "cross_entropy"])
def test_so_they_are_without_reconstruction(supervision: str) -> None:
    expected, half = (
        outcome(objective(None, supervision=supervision), autocast=autocast) for autocast in (False, True)
    )
    for slices in (2, 4, 6, 50):
        own = objective(None, slices=slices, supervision=supervision)
        assert_near(outcome(own), expected, 1e-5)
        own.zero_grad()
        assert_near(outcome(own, autocast=True), half, 0.02)


@pytest.mark.parametrize("target", ["image", "features"])
@pytest.mark.parametrize("loss", RECONSTRUCTION_LOSSES)
def test_under_autocast_it_is_as_near_to_float32_as_the_plain_loss(loss: str, target: str) -> None:
    exact = outcome(objective(target, loss))
    plain, sliced = (outcome(objective(target, loss, slices=n), autocast=True) for n in (1, 3))
    for name, value in exact.items():
        error, expected = ((part[name] - value).norm() / value.norm() for part in (sliced, plain))
        assert error < max(1.5 * float(expected), 0.01), name


def test_the_slices_compute_under_the_autocast_of_the_plain_loss() -> None:
    seen: list[tuple[str, torch.dtype | bool]] = []

    class Look(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            y.register_hook(lambda grad: seen.append(("autocast in backward", torch.is_autocast_enabled("cpu"))))
            seen.append(("output", y.dtype))
            return y

    def decoder(in_channels: int, out_channels: int, upscale: int) -> nn.Module:
        return nn.Sequential(nn.Upsample(scale_factor=upscale), Look(in_channels, out_channels, 1))

    own = objective(decoder=decoder, slices=2)
    loss = own.reconstruction_loss

    def look(prediction: Tensor, target: Tensor) -> Tensor:
        seen.append(("loss", (prediction @ prediction.mT).dtype))  # a product shows whether autocast is on
        return loss(prediction, target)

    own.reconstruction_loss = look
    outcome(own, autocast=True)
    half = torch.bfloat16
    assert seen == [("output", half), ("loss", torch.float32), ("autocast in backward", False)] * 2


def test_parameters_without_gradient_and_accumulation() -> None:
    plain, sliced = objective(), objective(slices=4)
    for own in (plain, sliced):
        assert own.decoder is not None
        own.decoder[0].weight.requires_grad_(False)
        outcome(own)
    twice = [outcome(own) for own in (sliced, plain)]  # the second call accumulates
    assert sliced.decoder[0].weight.grad is None  # type: ignore[index]
    expected = {name: value for name, value in twice[1].items() if name != "decoder.0.weight"}
    assert_near(twice[0], expected, 1e-5)


def test_gradients_by_torch_autograd_grad_and_only_once() -> None:
    found = []
    for slices in (1, 3):
        own = objective(slices=slices)
        loss = own(*batch_of(), LABELS)[0]["reconstruction"]
        trained = {name: p for name, p in own.named_parameters() if not name.startswith("head")}
        given = torch.autograd.grad(loss, list(trained.values()), retain_graph=True)
        found.append(dict(zip(trained, given, strict=True)))
        assert all(p.grad is None for p in own.parameters())
    assert_near(found[1], found[0], 1e-5)
    with pytest.raises(RuntimeError, match="the backward pass runs only once"):
        torch.autograd.grad(loss, list(trained.values()))


def test_without_reconstruction_only_once() -> None:
    own = objective(None, slices=3)
    loss = own(*batch_of(), LABELS)[0]["contrast"]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the backward pass runs only once"):
        loss.backward()


def of_means(piece: Tensor, part: slice) -> Tensor:
    return piece.mean((1, 2, 3)).square().mean()


def test_a_decoder_part_that_is_not_used_gets_no_gradient() -> None:
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    hidden = torch.ones(4, 3, 1, 1, requires_grad=True)
    found = pooled_and_loss(hidden, lambda piece, part: (piece.detach().mean((2, 3)) * weights[0]).sum(), weights, 2)
    assert found[1] is not None
    found[1].backward()
    assert weights[1].grad is None
    torch.testing.assert_close(weights[0].grad, 2 * F.gelu(torch.ones(3)))  # the sum of 4 images, in means of halves
    torch.testing.assert_close(hidden.grad, torch.zeros(4, 3, 1, 1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("slices", [1, 3, 5])
def test_in_float64_the_slices_give_the_whole_batchs_values(slices: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    start, target = torch.randn(2, 5, 4, 3, 2, dtype=torch.float64).unbind()
    decoder = nn.Conv2d(4, 4, 1, dtype=torch.float64)
    found: list[list[Tensor]] = []
    for plain in (True, False):
        hidden = start.clone(memory_format=layout).requires_grad_()
        maps = F.gelu(hidden)

        def loss_of(piece: Tensor, part: slice) -> Tensor:
            return mse(decoder(piece), target[part])

        if plain:
            pooled, loss = maps.mean((2, 3)), loss_of(maps, slice(None))
        else:
            pooled, given = pooled_and_loss(hidden, loss_of, decoder.parameters(), slices)
            assert given is not None
            loss = given
        total = pooled.exp().sum() + 3 * loss
        found.append([pooled, loss, *torch.autograd.grad(total, [hidden, *decoder.parameters()])])
    for value, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@pytest.fixture
def exact_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localfeat.memory.tracker.BLOCK_BYTES", 1)


def memory(own: LocalObjective, images: int) -> tuple[int, int]:
    """Return the bytes after forward and the peak of forward and backward, beyond weights, features and images."""
    inputs, outputs, pictures = batch_of(images)
    outputs.requires_grad_()
    labels = torch.arange(images) % 3
    with StorageTracker([*own.parameters(), *own.buffers(), inputs, outputs, pictures, labels]) as tracker:
        persistent = tracker.live_bytes
        terms, _ = own(inputs, outputs, pictures, labels)
        loss = weighted_sum(terms, own.weights)
        del terms
        after = tracker.live_bytes - persistent
        loss.backward()
    return after, tracker.peak_bytes - persistent


def per_image(slices: int, **kinds: Any) -> list[float]:
    """Return the same per image, so that weights cancel."""
    less, more = memory(objective(slices=slices, **kinds), 16), memory(objective(slices=slices, **kinds), 32)
    return [(b - a) / 16 for a, b in zip(less, more, strict=True)]


@pytest.mark.usefixtures("exact_bytes")
def test_memory_of_prediction_target_and_decoder_is_one_slices() -> None:
    """Use image reconstruction with the interpolating decoder, the heaviest case."""
    stairs = 128 * 4**2 + (128 + 32) * 8**2 + 32 * 16**2  # GELU's inputs, and what is interpolated
    activations = 4 * (stairs + 2 * 3 * 16**2)  # and two of images
    plain_after, plain_peak = per_image(1)
    for slices in (2, 4, 8, 16):
        after, peak = per_image(slices)
        assert plain_after - after == pytest.approx(activations, rel=0.1)  # maps are freed, their gradient is kept
        excess = peak - after  # in a slice, activations and their gradients
        assert excess < 1.7 * activations / slices + 2 * CELLS * WIDTH
    assert plain_peak > 7 * peak


CELLS = 4 * 4
NORM = 4 * CELLS * (OUTPUTS.channels + 2)
"""Bytes per image of the convolution's input, with the norm's statistics."""


@pytest.mark.usefixtures("exact_bytes")
def test_of_the_whole_batch_there_are_the_convolutions_input_and_output_and_one_gradient() -> None:
    maps = 4 * CELLS * WIDTH
    after, peak = per_image(16, reconstruct="features", decoder="one_layer", supervision="cross_entropy")
    assert NORM + 2 * maps < after < NORM + 2.5 * maps
    assert peak < NORM + 3 * maps  # features after GELU, or a second gradient, would be a third
    assert per_image(1, reconstruct="features", decoder="one_layer", supervision="cross_entropy")[1] > NORM + 8 * maps


@pytest.mark.usefixtures("exact_bytes")
def test_without_reconstruction_the_gradient_takes_the_convolutions_place() -> None:
    width = 32
    maps = 4 * CELLS * width
    after, peak = per_image(16, reconstruct=None, supervision="cross_entropy", width=width)
    assert NORM + maps < after < NORM + 1.5 * maps
    assert peak < NORM + 1.9 * maps
    assert per_image(1, reconstruct=None, supervision="cross_entropy", width=width)[1] >= NORM + 2 * maps


def test_gradients_are_handed_over_without_a_copy() -> None:
    weight = nn.Parameter(torch.randn(3))
    hidden = torch.randn(8, 3, 2, 2, requires_grad=True)
    pooled, loss = pooled_and_loss(hidden, lambda piece, part: (piece.sum((2, 3)) * weight).mean(), [weight], 2)
    assert loss is not None
    addresses = [tensor.data_ptr() for tensor in loss.grad_fn.gradients]  # type: ignore[union-attr]
    (loss + pooled.sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert [hidden.grad.data_ptr(), weight.grad.data_ptr()] == addresses


@pytest.mark.parametrize("how", ["no_grad", "eval"])
def test_evaluation_takes_no_gradients(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localfeat.methods.objectives.reconstruction.pooled_and_loss", None)
    own = objective(slices=3).train(how == "no_grad")
    with torch.set_grad_enabled(how == "eval"):
        found = own(*batch_of(), LABELS)[0]["reconstruction"]
    assert torch.equal(found, objective()(*batch_of(), LABELS)[0]["reconstruction"])


def test_float16_waits_for_the_scaled_loss() -> None:
    """Keep gradients too small for float16, as the loss is scaled before its gradient is computed."""
    scale, found = 2.0**20, []
    for slices, half in ((1, False), (3, True)):
        own = objective(slices=slices, loss="mse")
        own.reconstruction_loss = lambda prediction, target: 1e-6 * mse(prediction, target)
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = own(*batch_of(), LABELS)[0]["reconstruction"]
        (scale * loss).backward()
        assert own.decoder is not None
        found.append(gradients(own.decoder))
    assert_near(found[1], found[0], 0.01)


@pytest.mark.parametrize("target", ["image", "features", None])
def test_without_data_on_the_meta_device(target: str | None) -> None:
    own = objective(target, slices=4).to("meta")
    inputs, outputs, images = (tensor.to("meta") for tensor in batch_of())
    terms, _ = own(inputs, outputs.requires_grad_(), images, LABELS.to("meta"))
    sum(terms.values()).backward()
    assert outputs.grad is not None and outputs.grad.shape == outputs.shape
    assert all(p.grad is not None and p.grad.shape == p.shape for p in own.parameters())


@pytest.mark.parametrize(
    ("norm", "refused"),
    [
        (nn.BatchNorm2d(3), True),
        (nn.SyncBatchNorm(3), True),
        (nn.InstanceNorm2d(3, track_running_stats=True), True),
        (nn.InstanceNorm2d(3), False),
        (nn.GroupNorm(1, 3), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_a_decoder_with_statistics_of_the_batch_is_refused(norm: nn.Module, refused: bool) -> None:
    def decoder(in_channels: int, out_channels: int, upscale: int) -> nn.Module:
        resize = nn.Upsample(scale_factor=upscale)
        return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), resize, copy.deepcopy(norm))

    objective(decoder=decoder, slices=1)
    if not refused:
        objective(decoder=decoder, slices=4)
        return
    with pytest.raises(UserError, match=rf"efficiency.loss_slices=4: .*{type(norm).__name__}.*loss_slices=1"):
        objective(decoder=decoder, slices=4)


@pytest.mark.parametrize("method", LOCAL_METHODS)
@pytest.mark.parametrize("family", SPLIT_BACKBONES)
def test_a_learner_has_the_same_losses_and_gradients(method: str, family: str) -> None:
    results = []
    for slices in (1, 3):
        model = learner(method, 3, family, decoder="interp", efficiency=Efficiency(loss_slices=slices))
        losses: list[Tensor] = []

        def backward(loss: Tensor, losses: list[Tensor] = losses) -> None:
            losses.append(loss.detach())
            (loss / 2).backward()

        model.train_modules(lambda: batch(8), backward, lambda index: None)
        results.append((torch.stack(losses), gradients(model), list(model.state_dict())))
    (losses_plain, plain, keys), (losses_sliced, sliced, sliced_keys) = results
    torch.testing.assert_close(losses_sliced, losses_plain, rtol=1e-5, atol=0)
    assert sliced_keys == keys
    for name, expected in plain.items():
        torch.testing.assert_close(sliced[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-9)


def test_a_trainer_with_mixed_precision_and_accumulation_takes_it() -> None:
    finals = []
    for slices in (1, 4):
        model = learner("image_recon", 2, accumulate=2, efficiency=Efficiency(loss_slices=slices))
        trainer(precision="bf16-mixed").fit(model, loader(4))
        finals.append(model.epoch_means)
    assert finals[1] == pytest.approx(finals[0], rel=1e-2)

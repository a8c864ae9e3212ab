"""The learner under a plain Trainer: counting, schedules, clipping, accumulation, checkpoints, evaluation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import nn

from localfeat.learner.module import Learner
from localfeat.learner.optimization import Optimization, undecayed_parameters
from localfeat.methods.head_and_decoder import HeadAndDecoder
from localfeat.methods.registry import METHODS
from localfeat.utils.errors import UserError
from tests.helpers.small import CLASSES, AtStep, Metrics, backbone, batch, gradients, learner, loader, trainer

# --- counting ---


def checkpoints_every(steps: int, folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=steps, save_top_k=-1)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("method", ["e2e", "feature_recon"])
def test_global_step_counts_batches(method: str, accumulate: int, tmp_path: Path) -> None:
    run = trainer(checkpoints_every(2, tmp_path), enable_checkpointing=True, max_epochs=2)
    run.fit(learner(method, 4, accumulate=accumulate), loader(5))
    assert run.global_step == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step={n}.ckpt" for n in (10, 2, 4, 6, 8)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_max_steps_is_a_number_of_batches(accumulate: int) -> None:
    metrics = Metrics()
    run = trainer(metrics, max_steps=7)
    run.fit(learner("greedy_ce", 4, accumulate=accumulate), loader(5))
    assert run.global_step == len(metrics.steps) == 7


class LearningRates(Callback):
    """The rate of every parameter group at every batch, read where it is used: at the optimizers' steps."""

    def __init__(self) -> None:
        self.used: list[list[float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for number, optimizer in enumerate(trainer.optimizers):
            self.used.append([])
            optimizer.register_step_pre_hook(
                lambda optimizer, *_, number=number: self.used[number].extend({g["lr"] for g in optimizer.param_groups})
            )


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_steps": 10, "max_epochs": 9}, {"max_steps": 10}], ids=str)
def test_learning_rates_are_a_linear_warm_up_and_a_cosine(limits: dict[str, int]) -> None:
    rates = LearningRates()
    trainer(rates, **limits).fit(learner("greedy_ce", 2, lr=0.1, warmup=0.3, final_lr=0.2), loader(5))
    cosine = [0.02 + 0.08 * (1 + math.cos(math.pi * k / 7)) / 2 for k in range(7)]
    expected = [0.025, 0.05, 0.075, *cosine]
    assert rates.used == [pytest.approx(expected)] * 2


def test_schedule_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match="give the Trainer max_steps, or max_epochs"):
        trainer(max_epochs=-1, max_time={"minutes": 1}).fit(learner("greedy_ce", 2), loader(1))


def test_lr_factor_ends_at_final_lr_and_never_leaves_the_range() -> None:
    plain = Optimization(warmup=0.1, final_lr=0.01)
    values = [plain.lr_factor(step, 100) for step in range(120)]
    assert values[10] == 1
    assert values[100:] == [pytest.approx(0.01)] * 20
    assert min(values) > 0
    assert max(values) == 1
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)
    for total in (0, 1, 2):
        assert 0 <= Optimization(warmup=1.0).lr_factor(0, total) <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"weight_decay": -1.0},
        {"betas": (0.9, 1.0)},
        {"warmup": 1.5},
        {"final_lr": -0.1},
        {"gradient_clip": 0.0},
        {"accumulate": 0},
        {"stop_after_nonfinite": 0},
    ],
    ids=str,
)
def test_wrong_optimizer_settings_are_refused(wrong: dict[str, Any]) -> None:
    (key, value), *_ = wrong.items()
    with pytest.raises(UserError, match=rf"^optimizer\.{key}=") as error:
        Optimization(**wrong)
    assert str(value) in str(error.value)


# --- the optimizer's step ---


def norms_at_steps(model: Learner, data: Any, **arguments: Any) -> dict[int, list[float]]:
    norms: dict[int, list[float]] = {}

    def look(trainer: Any, number: int) -> None:
        parts = [p.grad.float().norm() for g in trainer.optimizers[number].param_groups for p in g["params"]]
        norms.setdefault(number, []).append(float(torch.stack(parts).norm()))

    trainer(AtStep(look), **arguments).fit(model, data)
    return norms


def test_every_module_is_clipped_on_its_own() -> None:
    clip = 1e-3
    free = norms_at_steps(learner("feature_recon", 4, gradient_clip=None), loader(1))
    assert min(norms[0] for norms in free.values()) > 10 * clip
    clipped = norms_at_steps(learner("feature_recon", 4, gradient_clip=clip), loader(2))
    assert clipped == {number: [pytest.approx(clip, rel=1e-2)] * 2 for number in range(4)}
    bound = 1.01 * max(norms[0] for norms in free.values())
    assert norms_at_steps(learner("feature_recon", 4, gradient_clip=bound), loader(1)) == {
        number: [pytest.approx(norm[0], rel=1e-5)] for number, norm in free.items()
    }


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", ["e2e", "greedy_ce"])
def test_accumulated_gradients_are_those_of_the_big_batch(method: str, precision: str) -> None:
    found: dict[int, list[Any]] = {1: [], 2: []}
    data = {1: loader(1, 8), 2: torch.utils.data.DataLoader(loader(1, 8).dataset, batch_size=4)}
    for accumulate in (1, 2):
        model = learner(method, 4, accumulate=accumulate, gradient_clip=None)

        def look(_: Any, number: int, model: Learner = model, accumulate: int = accumulate) -> None:
            found[accumulate].append(gradients(model.local_modules[number]))

        trainer(AtStep(look), precision=precision).fit(model, data[accumulate])
    assert len(found[1]) == len(found[2]) == (1 if method == "e2e" else 4)
    relative = 1e-5 if precision == "32-true" else 0.05
    for one, two in zip(found[1], found[2], strict=True):
        difference = torch.cat([(two[name] - gradient).flatten() for name, gradient in one.items()])
        assert difference.norm() < relative * torch.cat([gradient.flatten() for gradient in one.values()]).norm()


def test_the_rest_of_an_epoch_steps_too() -> None:
    steps: list[int] = []
    model = learner("greedy_ce", 2, accumulate=3)
    trainer(AtStep(lambda trainer, _: steps.append(trainer.global_step)), max_epochs=2).fit(model, loader(4))
    assert steps == [2, 2, 3, 3, 6, 6, 7, 7], "after batches 3 and 4 of both epochs, in both modules"


def test_no_weight_decay_on_norms_biases_tables_and_tokens() -> None:
    for family, expected in {
        "swin": ("relative_position_bias_table",),
        "vit_registers": ("cls_token", "reg_token", "pos_embed"),
        "convnext": (),
    }.items():
        model = learner("feature_recon", 4, family)
        never = undecayed_parameters(model.backbone, model.local_modules)
        decayed: dict[int, float] = {}
        for module in model.local_modules:
            for group in model.optimization.build(module, never, fused=False).param_groups:
                decayed.update({id(p): group["weight_decay"] for p in group["params"]})
        for name, p in model.named_parameters():
            free = p.ndim <= 1 or name.endswith(expected)
            assert decayed.pop(id(p)) == (0 if free else 0.05), name
            assert not (free and name.endswith("weight")) or p.ndim == 1, name
        assert not decayed


def test_frozen_parameters_are_left_out() -> None:
    network = backbone()
    network.patch_embed.requires_grad_(False)
    before = network.patch_embed.proj.weight.clone()
    trainer().fit(Learner(network, "feature_recon", 4), loader(2))
    assert torch.equal(network.patch_embed.proj.weight, before)


# --- checkpoints ---


def test_checkpoint_loads_with_weights_only_and_resumes_exactly(tmp_path: Path) -> None:
    whole = learner("feature_recon", 4, warmup=0.2)
    trainer(Metrics(), checkpoints_every(3, tmp_path), enable_checkpointing=True, max_epochs=2).fit(whole, loader(3))
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert saved["localfeat"] == {"method": "feature_recon", "blocks_per_module": [1, 1, 1, 1]}
    assert saved["global_step"] == 3
    assert len(saved["optimizer_states"]) == len(saved["lr_schedulers"]) == 4
    again = learner("feature_recon", 4, warmup=0.2)
    resumed = trainer(Metrics(), max_epochs=2)
    resumed.fit(again, loader(3), ckpt_path=tmp_path / "step=3.ckpt")
    assert resumed.global_step == 6
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize(("method", "split"), [("feature_recon", 2), ("feature_recon", [1, 3]), ("image_recon", 4)])
def test_a_checkpoint_of_other_modules_is_refused(method: str, split: Any, tmp_path: Path) -> None:
    file = tmp_path / "k4.ckpt"
    run = trainer()
    run.fit(learner("feature_recon", 4), loader(1))
    run.save_checkpoint(file)
    with pytest.raises(UserError, match="the checkpoint was written by") as error:
        trainer().fit(learner(method, split), loader(1), ckpt_path=file)
    assert "\n" not in str(error.value)


def test_averaged_weights(tmp_path: Path) -> None:
    """An exponential mean kept beside the training, saved in checkpoints, used for validation and in the end."""
    followed: list[torch.Tensor] = []

    class Follow(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            followed.append(pl_module.backbone.head.fc.weight.detach().clone())

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            followed.append(pl_module.backbone.head.fc.weight.detach().clone())

    model = learner("feature_recon", 4, lr=1e-2)
    best = ModelCheckpoint(dirpath=tmp_path, filename="best", monitor="val/loss")
    run = trainer(Follow(), EMAWeightAveraging(decay=0.5), best, enable_checkpointing=True)
    data = loader(4)
    run.fit(model, data, loader(2))
    mean = followed[1]  # the first update copies
    for weight in followed[2:]:
        mean = 0.5 * mean + 0.5 * weight
    assert not torch.allclose(mean, followed[-1])
    torch.testing.assert_close(model.backbone.head.fc.weight.detach(), mean)
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    name = next(n for n, p in model.named_parameters() if p is model.backbone.head.fc.weight)
    torch.testing.assert_close(saved["state_dict"][name], mean)
    measured = trainer().validate(model, loader(2), verbose=False)[0]
    assert float(best.best_model_score) == pytest.approx(measured["val/loss"], rel=1e-5)


# --- evaluation and what is logged ---


def test_plain_loaders_and_a_plain_trainer_are_enough() -> None:
    model = Learner(backbone(), "feature_recon", split=4)
    run = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    run.fit(model, loader(2), loader(1))
    run.test(model, loader(1), verbose=False)
    assert {"test/loss", "test/accuracy"} <= run.callback_metrics.keys()


@pytest.mark.parametrize("method", METHODS)
def test_logged_figures(method: str) -> None:
    metrics = Metrics()
    run = trainer(metrics)
    model = learner(method, 4, lr=0.01)
    run.fit(model, loader(3), loader(1))
    modules = len(model.local_modules)
    expected = {"train/loss", "train/accuracy", "train/lr", "train/skipped_steps", "loss"}
    expected |= {f"train/module_{n}/loss" for n in range(1, modules + 1)} | {f"train/module_{modules}/cross_entropy"}
    for number, module in enumerate(model.local_modules, start=1):
        expected |= {f"train/module_{number}/{term}" for term in module.objective.weights}
    assert set(metrics.steps[0]) == expected
    assert set(run.callback_metrics) == expected | {"val/loss", "val/accuracy"}
    assert all(math.isfinite(value) for step in metrics.steps for value in step.values())
    for name, mean in model.epoch_means.items():
        assert mean == pytest.approx(sum(step[name] for step in metrics.steps) / 3, rel=1e-5)
    assert set(model.epoch_means) == expected - {"train/lr", "train/skipped_steps", "loss"}


def test_training_accuracy_is_that_of_the_batch() -> None:
    metrics = Metrics()
    model = learner("greedy_ce", 4)
    with torch.no_grad():
        logits = model(batch(8, 0)[0])
    trainer(metrics).fit(model, loader(1))
    assert metrics.steps[0]["train/accuracy"] == pytest.approx(float((logits.argmax(1) == batch()[1]).float().mean()))


def test_evaluation_runs_no_auxiliary_part_and_keeps_no_graph() -> None:
    model = learner("feature_recon", 4)

    def never(*_: Any) -> None:
        raise AssertionError("an auxiliary part ran")

    for module in list(model.local_modules)[:-1]:
        for part in (module.objective.auxiliary, module.objective.head, module.objective.decoder):
            part.register_forward_hook(never)
    trainer().test(model, loader(2), verbose=False)


class Modes(Callback):
    def __init__(self) -> None:
        self.modes: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.modes += [pl_module.training, pl_module.backbone.training, pl_module.local_modules.training]


@pytest.mark.parametrize("checks", [0, 1], ids=["no sanity check", "sanity check"])
def test_the_backbone_is_back_in_training_mode_after_validation(checks: int) -> None:
    """The timm model itself is not registered, and some families look at its own mode (dropout of a ResNet)."""
    modes = Modes()
    model = learner("greedy_ce", 2, "resnet", changes={"drop_rate": 0.5})
    trainer(modes, max_epochs=2, num_sanity_val_steps=checks).fit(model, loader(2), loader(1))
    assert all(modes.modes)


@pytest.mark.parametrize("family", ["swin", "vit", "convnext"])
def test_reconstructions_are_looked_at_in_one_range(family: str) -> None:
    images, _ = batch(2)
    for method, kind in (("image_recon", "image"), ("feature_recon", "features")):
        for loss in ("bce", "mse", "smooth_l1", "cosine"):
            own = HeadAndDecoder("own", reconstruct=kind, reconstruction_loss=loss)
            shown = learner(own, 4, family).reconstruct(images)
            assert [(r.module, r.kind) for r in shown] == [(1, kind), (2, kind), (3, kind)], method
            for r in shown:
                assert r.target.shape == r.output.shape
                assert not r.output.requires_grad
                if kind == "image":
                    assert r.target.shape == images.shape
                    assert 0 <= min(r.target.min(), r.output.min()) <= max(r.target.max(), r.output.max()) <= 1
    assert learner("greedy_ce", 4, family).reconstruct(images) == []


def test_parameter_counts() -> None:
    model = learner("feature_recon", 4)
    counts = model.parameter_counts()
    assert counts["backbone"] == sum(p.numel() for p in backbone().parameters())
    assert counts["total"] == counts["backbone"] + counts["auxiliary"] == sum(p.numel() for p in model.parameters())
    assert sum(counts[f"module_{n}"] for n in range(1, 5)) == counts["total"]
    assert learner("e2e", 4).parameter_counts()["auxiliary"] == 0


def test_soft_labels() -> None:
    images, labels = batch()
    soft = 0.7 * nn.functional.one_hot(labels, CLASSES) + 0.3 * nn.functional.one_hot(labels.roll(1), CLASSES)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, soft.float()), batch_size=8)
    metrics = Metrics()
    model = learner("greedy_ce", 4)
    with torch.no_grad():
        logits = model(images)
    trainer(metrics).fit(model, data)
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    assert metrics.steps[0]["train/loss"] == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(UserError, match="switch mixup and cutmix off"):
        trainer().fit(learner("feature_recon", 4), data)


def test_label_smoothing_reaches_every_cross_entropy_of_training_only() -> None:
    metrics = Metrics()
    model = learner(HeadAndDecoder("smooth", supervision="cross_entropy", label_smoothing=0.2), 2)
    with torch.no_grad():
        images, labels = batch()
        log_p = model(images).log_softmax(1)
    hard = -log_p[torch.arange(8), labels].mean()
    assert trainer().validate(model, loader(1), verbose=False)[0]["val/loss"] == pytest.approx(float(hard), rel=1e-5)
    trainer(metrics).fit(model, loader(1))
    assert metrics.steps[0]["train/loss"] == pytest.approx(float(0.8 * hard - 0.2 * log_p.mean()), rel=1e-5)
    first = metrics.steps[0]["train/module_1/cross_entropy"]
    plain = Metrics()
    trainer(plain).fit(learner("greedy_ce", 2), loader(1))
    assert first != plain.steps[0]["train/module_1/cross_entropy"]


@pytest.mark.parametrize("method", ["feature_recon", "greedy_contrast"])
def test_odd_batches(method: str) -> None:
    """One image, one class, all classes different, a rest at the end: finite losses and weights."""
    images, _ = batch(7)
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 3])
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=3)
    model, metrics = learner(method, 4), Metrics()
    trainer(metrics).fit(model, data)
    assert len(metrics.steps) == 3
    assert metrics.steps[2]["train/module_1/contrast"] == 0
    assert all(p.isfinite().all() for p in model.parameters())

"""Small networks, batches, loaders and trainers for tests. Nothing here takes more than some 10 ms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from localfeat.backbones.timm_models import build_backbone
from localfeat.efficiency.settings import Efficiency
from localfeat.learner.module import Learner
from localfeat.learner.optimization import Optimization
from localfeat.methods.registry import METHODS, as_method

IMAGE_SIZE = 32
RGB_IMAGE = torch.empty(3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8, device="meta")  # as a loader gives it
CLASSES = 5
LOCAL_METHODS = [name for name, method in METHODS.items() if method.local]

_CONV = {"pretrained_cfg_overlay": {"input_size": (3, IMAGE_SIZE, IMAGE_SIZE)}}
_SWIN = {"patch_size": 2, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", {**_SWIN, "window_size": 4}),
    "swinv2": ("swinv2_tiny_window8_256", {**_SWIN, "window_size": 4}),
    "vit": ("vit_tiny_patch16_224", _VIT),
    "vit_registers": ("vit_small_patch14_reg4_dinov2", _VIT),
    "convnext": ("convnext_atto", {**_CONV, "depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}),
    "resnet": ("resnet18", {**_CONV, "channels": (8, 16, 24, 32)}),
}
SPLIT_BACKBONES = ["swin", "vit", "convnext"]


def settings(methods: Iterable[str]) -> list[tuple[str, Any, str]]:
    """Return (method, split, family): every method in four modules of every family, and other cuts where they matter.

    Other cuts change what an objective is made of for methods that read the blocks above, count the modules or decode.
    """
    others = [(method, split) for method in ("image_recon", "trgl", "auglocal") for split in (2, [1], [1, 3])]
    return [(m, 4, family) for m in methods for family in SPLIT_BACKBONES] + [(*other, "swin") for other in others]


def backbone(family: str = "swin", *, seed: int = 0, drop_path_rate: float = 0.0, **changes: Any) -> nn.Module:
    """Return a small timm model, with weights that depend on the seed; ``changes`` are its constructor arguments."""
    name, arguments = FAMILIES[family]
    torch.manual_seed(seed)
    return build_backbone(
        name, CLASSES, image_size=IMAGE_SIZE, drop_path_rate=drop_path_rate, arguments={**arguments, **changes}
    )


def disturbed(network: nn.Module) -> nn.Module:
    """Return the network with noise on every parameter, because zero-initialised residual branches hide gradients."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def learner(
    method: Any = "feature_recon",
    split: Any = 4,
    family: str = "swin",
    *,
    decoder: Any = "one_layer",
    drop_path_rate: float = 0.0,
    changes: dict[str, Any] | None = None,
    efficiency: Efficiency | None = None,
    **optimization: Any,
) -> Learner:
    """Return a learner with a fixed seed; ``changes`` go to the backbone, further keywords to :class:`Optimization`."""
    network = backbone(family, drop_path_rate=drop_path_rate, **(changes or {}))
    if isinstance(method, str):
        method = as_method(method, label_smoothing=0.0)  # so that references are plain cross entropy
    settings = Optimization(**{"warmup": 0.0, **optimization})
    return Learner(network, method, split, decoder, optimization=settings, efficiency=efficiency)


def batch(size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return images (size, 3, 32, 32) and labels (size,) cycling through three classes, so that positives exist."""
    images = torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
    return images, torch.arange(size) % 3


def loader(batches: int, size: int = 8) -> DataLoader[Any]:
    """Return a loader of ``batches`` different batches in a fixed order."""
    parts = [batch(size, seed) for seed in range(batches)]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return DataLoader(TensorDataset(images, labels), batch_size=size)


def trainer(*callbacks: Callback, **arguments: Any) -> lightning.Trainer:
    """Return a silent trainer on the CPU that writes nothing unless a test asks for it."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "callbacks": list(callbacks),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    if not {"max_epochs", "max_steps"} & arguments.keys():
        defaults["max_epochs"] = 1
    return lightning.Trainer(**{**defaults, **arguments})


class Metrics(Callback):
    """Keeps the logged metrics of every training batch; seeds each batch, so that drop path can be reproduced."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class AtStep(Callback):
    """Calls ``look(trainer, number)`` when the optimizer of module ``number`` (from 0) has stepped.

    The gradients are then what the optimizer saw: unscaled and clipped (Lightning clips inside the step).
    """

    def __init__(self, look: Callable[[Any, int], None]) -> None:
        self.look = look

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for number, optimizer in enumerate(trainer.optimizers):
            optimizer.register_step_post_hook(lambda *_, number=number: self.look(trainer, number))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all gradients, with zeros for None."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in module.named_parameters()
    }

"""Reconstruction of a module's input features through a narrow layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from localfeat.backbones.layout import FeatureShape
from localfeat.efficiency.autocast import without_autocast
from localfeat.methods.objective import Objective, Terms
from localfeat.methods.parts.losses import mse

GAIN = 0.1  # of the initial weights


class InputObjective(Objective):
    """The mean squared error of the input features, reconstructed from the output features.

    Args:
        outputs: the features that are read.
        inputs: the features to reconstruct; prefix tokens are left out of both.
        weight: of the error.
    """

    def __init__(self, outputs: FeatureShape, inputs: FeatureShape, weight: float) -> None:
        super().__init__()
        self.outputs, self.inputs, self.weights = outputs, inputs, {"reconstruction": weight}
        self.upscale = max(-(-inputs.height // outputs.height), -(-inputs.width // outputs.width))
        self.norm = nn.LayerNorm(outputs.channels)
        narrow = max(1, outputs.channels // 4)
        self.down = nn.Linear(outputs.channels, narrow)
        self.up = nn.Linear(narrow, inputs.channels * self.upscale**2)
        for layer in (self.down, self.up):
            nn.init.xavier_uniform_(layer.weight, gain=GAIN)
            nn.init.zeros_(layer.bias)

    def forward(
        self, inputs: Tensor, outputs: Tensor, images: Tensor | None, labels: Tensor
    ) -> tuple[Terms, Tensor | None]:
        x = self.outputs.to_nhwc(outputs)
        x = self.up(F.gelu(self.down(self.norm(x))))  # (B, h, w, r · r · C)
        if (r := self.upscale) > 1:  # every pixel becomes a square of r x r
            x = x.unflatten(-1, (r, r, -1)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
        target = self.inputs.to_nhwc(inputs)
        x = x[:, : self.inputs.height, : self.inputs.width]
        with without_autocast(x.device):
            return {"reconstruction": mse(x.float(), target.float())}, None

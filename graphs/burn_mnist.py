"""The MNIST example net of the Burn framework: three 3x3 convolutions, batch norm, two linear layers.

Assumed, because shapes cannot tell: ReLU after each convolution and after the first linear layer, batch
norm after the third ReLU, log-softmax at the end.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "burn-mnist"
_RANKS = {
    **{f"conv{i}.{kind}": rank for i in (1, 2, 3) for kind, rank in (("weight", 4), ("bias", 1))},
    **{f"fc{i}.{kind}": rank for i in (1, 2) for kind, rank in (("weight", 2), ("bias", 1))},
    **{f"norm{i}.{kind}": 1 for i in (1, 2) for kind in ("weight", "bias", "running_mean", "running_var")},
    **{f"norm{i}.num_batches_tracked": 0 for i in (1, 2)},
}


class _Net(nn.Module):
    def __init__(self, widths: list[int], features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(widths[0], widths[1], 3)
        self.conv2 = nn.Conv2d(widths[1], widths[2], 3)
        self.conv3 = nn.Conv2d(widths[2], widths[3], 3)
        self.norm1 = nn.BatchNorm2d(widths[3])
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, classes)
        self.norm2 = nn.BatchNorm1d(classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.norm1(F.relu(self.conv3(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        return F.log_softmax(self.norm2(self.fc2(x)), dim=1)


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise the net; input size solved from the flattened map (28 x 28 for MNIST)."""
    shapes = signature.shapes
    if {name: len(shape) for name, shape in shapes.items()} != _RANKS:
        return None
    channels = shapes["conv3.weight"][0]
    hidden, features = shapes["fc1.weight"]
    side = math.isqrt(features // channels) if channels else 0
    if not side or side * side * channels != features:
        return None
    widths = [shapes["conv1.weight"][1], *(shapes[f"conv{i}.weight"][0] for i in (1, 2, 3))]
    with torch.device("meta"):
        module = _Net(widths, features, hidden, shapes["fc2.weight"][0])
    return ws.Skeleton(module.eval(), (torch.randn(2, widths[0], side + 6, side + 6),), "Burn MNIST CNN")

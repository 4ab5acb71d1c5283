"""The bias-free MNIST perceptron of OTFusion (Singh & Jaggi 2020): 784-400-200-100-10 with ReLU."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "otfusion-mnist"


class _MLP(nn.Module):
    def __init__(self, weights: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Linear(w[1], w[0], bias=False) for w in weights)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        x = F.relu(self.fc3(x))
        return F.log_softmax(self.fc4(x), dim=1)


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise four bias-free layers ``fc1`` to ``fc4`` on a flattened square image."""
    shapes = signature.shapes
    if set(shapes) != {f"fc{i}.weight" for i in range(1, 5)}:
        return None
    weights = [shapes[f"fc{i}.weight"] for i in range(1, 5)]
    if any(len(w) != 2 for w in weights):
        return None
    if any(a[0] != b[1] for a, b in itertools.pairwise(weights)):
        return None
    with torch.device("meta"):
        module = _MLP(weights)
    return ws.Skeleton(module.eval(), (torch.randn(2, weights[0][1]),), "OTFusion MLP, no biases")

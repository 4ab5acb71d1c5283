"""Bias-free perceptrons ``l1, l2, ...`` of tinygrad, with leaky ReLU of slope 0.01 (assumed)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "mnist-mlp"


class _MLP(nn.Module):
    def __init__(self, weights: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.depth = len(weights)
        for i, (out, incoming) in enumerate(weights, start=1):
            self.add_module(f"l{i}", nn.Linear(incoming, out, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, self.depth + 1):
            x = self.get_submodule(f"l{i}")(x)
            if i < self.depth:
                x = F.leaky_relu(x)
        return x


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise two layers ``l1.weight`` and ``l2.weight`` without biases that fit together."""
    shapes = signature.shapes
    weights = [shapes.get(f"l{i}.weight", ()) for i in (1, 2)]
    if len(shapes) != 2 or any(len(w) != 2 for w in weights):
        return None
    if any(a[0] != b[1] for a, b in itertools.pairwise(weights)):
        return None
    with torch.device("meta"):
        module = _MLP(weights)
    widths = "-".join(str(w) for w in [weights[0][1], *(w[0] for w in weights)])
    return ws.Skeleton(module.eval(), (torch.randn(2, weights[0][1]),), f"tinygrad MLP {widths}")

"""A perceptron kept as bare NumPy matrices ``__syn0, __syn1, ...`` that multiply from the right.

The input carries a constant one as its last entry in place of a first bias; there are no other biases. The
activation follows every layer, the last one too. Assumed: ReLU.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

import weightspace as ws

FAMILY = "numpy-mlp"


class _MLP(nn.Module):
    def __init__(self, weights: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(torch.empty(w, dtype=dtype)) for w in weights])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((x, torch.ones_like(x[:, :1])), dim=1)
        for weight in self.layers:
            x = torch.relu(x @ weight)
        return x


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise matrices ``__syn<i>`` of shape (in, out) that fit together."""
    shapes = signature.shapes
    names = [f"__syn{i}" for i in range(len(shapes))]
    weights = [shapes.get(name, ()) for name in names]
    if len(weights) < 2 or any(len(w) != 2 for w in weights) or weights[0][0] < 2:
        return None
    if any(a[1] != b[0] for a, b in itertools.pairwise(weights)):
        return None
    dtype = signature.dtypes.get(names[0], torch.float64)
    with torch.device("meta"):
        module = _MLP(weights, dtype)
    rename = {f"layers.{i}": name for i, name in enumerate(names)}
    inputs = (torch.rand(2, weights[0][0] - 1, dtype=dtype),)
    return ws.Skeleton(module.eval(), inputs, "NumPy MLP, (in, out) matrices", rename=rename)

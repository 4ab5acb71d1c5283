"""NiNo without its graph network (Knyazev et al. 2025): a metanetwork that forecasts each weight on its own.

The last ``context`` values of a weight are projected, an embedding of the layer's kind is added, an MLP
with SiLU (assumed from the paper's code) predicts the change over the next steps, added to the last value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import weightspace as ws

FAMILY = "nino-mlp"
_RANKS = {
    "layer_embed.weight": 2,
    **{f"{layer}.{kind}": rank for layer in ("edge_proj.fc.0", *(f"edge_mlp.fc.{i}" for i in (0, 2, 4, 6)))
       for kind, rank in (("weight", 2), ("bias", 1))},
}  # fmt: skip


class _Perceptron(nn.Module):
    def __init__(self, weights: list[tuple[int, ...]]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for out, incoming in weights:
            layers += [nn.Linear(incoming, out), nn.SiLU()]
        self.fc = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class _NiNo(nn.Module):
    def __init__(self, kinds: tuple[int, ...], project: tuple[int, ...], mlp: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.layer_embed = nn.Embedding(kinds[0], kinds[1])
        self.edge_proj = _Perceptron([project])
        self.edge_mlp = _Perceptron(mlp)

    def forward(self, history: Tensor, kind: Tensor) -> Tensor:
        """``history``: (weights, context), ``kind``: (weights,). Returns (weights, steps)."""
        return history[:, -1:] + self.edge_mlp(self.edge_proj(history) + self.layer_embed(kind))


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise the MLP variant; inputs are two weights' histories and kinds."""
    shapes = signature.shapes
    if {name: len(shape) for name, shape in shapes.items()} != _RANKS:
        return None
    kinds, project = shapes["layer_embed.weight"], shapes["edge_proj.fc.0.weight"]
    with torch.device("meta"):
        module = _NiNo(kinds, project, [shapes[f"edge_mlp.fc.{i}.weight"] for i in (0, 2, 4, 6)])
    inputs = (torch.randn(2, project[1]), torch.randint(kinds[0], (2,)))
    return ws.Skeleton(module.eval(), inputs, "NiNo, MLP variant")

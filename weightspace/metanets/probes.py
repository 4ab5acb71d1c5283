"""Probes: what a network would answer to a few learned inputs, followed through its weights.

A network's own forward pass is operator message passing too: values of the inputs go through each block, get the
bias of the neuron and its activation. ``Probes`` does that for a handful of learned inputs at once and gives every
neuron its values as features; published metanets run the network for such features (Kofinas et al. 2024). Here
it needs no program, only the operators, so it works for every wiring: exactly for feed-forward networks
of linear layers, biases and pointwise activations; for the others (attention, norms over features, pooling) as
far as sums and pointwise functions go. A kernel is seen by each probe through a learned texture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.metanets.batch import CHUNK, Batch
from weightspace.metanets.structure import COORDINATES, NODE_FEATURES, POINTWISE

if TYPE_CHECKING:
    from weightspace.metanets.operator import Operators

_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "softplus": F.softplus, "abs": torch.abs,
}  # fmt: skip
_BOUND = 5.0
STEPS = 6
"""Steps that values are followed for: those of networks with as many layers."""


class Probes(nn.Module):
    """Values ``(nodes, count)`` of all neurons for ``count`` learned inputs, after ``steps`` steps.

    All neurons step at once: after as many steps as a network has layers its values are right and stay so. Values
    are kept as they are up to 5, and bent smoothly to stay below 10 beyond.
    """

    def __init__(self, count: int, steps: int) -> None:
        super().__init__()
        self.count, self.steps = count, steps
        self.input = nn.Linear(NODE_FEATURES, count)
        self.texture = nn.Linear(COORDINATES - 1, count, bias=False)
        nn.init.normal_(self.input.weight, std=0.15)
        nn.init.normal_(self.texture.weight, std=0.2)

    def forward(self, batch: Batch, operators: Sequence[Operators]) -> Tensor:
        """Values after the last step; inputs keep theirs."""
        given = self.input(batch.nodes.to(self.input.weight.dtype))
        fed = batch.marks[batch.cell, :1] > 0
        frequency = batch.frequency.to(given.dtype).unsqueeze(1)
        factor, shift = batch.affine.to(given.dtype).unsqueeze(2).unbind(1)
        kinds = activations(batch.activation)
        textures = [1 + self.texture(op.coordinates[:, 1:]) for op in operators]
        values = torch.where(fed, given, 0)
        for _ in range(self.steps):
            heard = torch.zeros_like(values)
            for op, texture in zip(operators, textures, strict=True):
                heard = heard.index_add(0, op.bucket.dst.flatten(), _along(op, values, texture).to(values.dtype))
            if batch.links.numel():
                heard = heard.index_add(0, batch.links[1], values[batch.links[0]])
            values = torch.where(fed, given, passed(factor * heard + shift, kinds, frequency))
        return values


def activations(activation: Tensor) -> list[tuple[str, Tensor]]:
    """The functions of ``POINTWISE`` that nodes go through, by number ``(nodes,)``: name, and where ``(n, 1)``."""
    present = [k for k in activation.unique().tolist() if k >= 0]
    return [(POINTWISE[k], (activation == k).unsqueeze(1)) for k in present]


def passed(heard: Tensor, kinds: Sequence[tuple[str, Tensor]], frequency: Tensor) -> Tensor:
    """Sums ``(nodes, count)`` after the activation of each node, and bounded."""
    for name, acts in kinds:
        heard = torch.where(acts, activated(name, heard, frequency), heard)
    return bounded(heard)


def bounded(x: Tensor) -> Tensor:
    """The identity up to 5, and below 10 beyond."""
    inside = x.clamp(-_BOUND, _BOUND)
    found: Tensor = inside + _BOUND * torch.tanh((x - inside) / _BOUND)
    return found


def activated(name: str, x: Tensor, frequency: Tensor) -> Tensor:
    """One of the functions of ``POINTWISE``; a sine has its ``frequency``."""
    found: Tensor = torch.sin(x * frequency) if name == "sin" else _FUNCTIONS[name](x)
    return found


def _along(op: Operators, values: Tensor, texture: Tensor) -> Tensor:
    """Sums ``Σ w x`` of a bucket, ``(B · out, count)``; ``texture (positions, count)``."""
    bucket, count = op.bucket, values.shape[1]
    (stack, out), inner = bucket.dst.shape, bucket.src.shape[1]
    source = values[bucket.src.flatten()].view(stack, 1, inner, count) * op.natural.view(-1, 1, 1, 1)
    source = (source * texture.unsqueeze(1)).reshape(stack, -1, count)
    if op.channels is not None:
        return torch.bmm(op.channels[0][:, :, : source.shape[1]].to(source.dtype), source).flatten(0, 1)
    assert bucket.rows is not None
    positions = len(texture)
    step = max(1, CHUNK // (inner * positions))
    parts = []
    for matrix in range(stack):
        for start in range(0, out, step):
            weight = bucket.rows(matrix, start, min(start + step, out))[0].to(device=source.device, dtype=source.dtype)
            parts.append(weight.transpose(1, 2).flatten(1) @ source[matrix])
    return torch.cat(parts)

"""Operator message passing: a metanet at the price of a few forward passes.

Only neurons carry state; the weights act as operators between them. In one round a block ``W`` (out, in, P)
from axis a to axis b sends, with state ``H_a`` (n_a, d) and pointwise channels ``φ_c`` of the weights,

    M_b += Σ_c Σ_p φ_c(W)[:, :, p]  (H_a U ⊙ a_cp)        M_a += Σ_c Σ_p φ_c(W)[:, :, p]ᵀ (H_b U' ⊙ b_cp)
    H   ← H + MLP( norm(H), M_b, M_a, mean of H over the cell )

The maps ``A_cp = U diag(a_cp)`` share their mixing ``U`` over channels and kernel positions; ``a_cp`` depends
on where the position lies in the kernel, on the role of the block, its depth in the network and its scale.
That keeps the cost at parameters × d where full maps per position would cost neurons × positions × d².

Channels are ``w`` itself, so that a round can follow what the network computes, and ``|w|`` and ``w²`` relative
to their means over the block, averaged over what they sum. All vanish at zero, and none depends on the width.

No state per weight is kept, so edge-level answers come from a read-out over blocks
(``weightspace.metanets.readout``). The same function over ``edge_index`` is in ``weightspace.metanets.edges``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weightspace.errors import MetanetError
from weightspace.graph import ParameterGraph
from weightspace.metanets.base import Metanet
from weightspace.metanets.batch import CHUNK, Batch, Bucket, Item, collate, prepare
from weightspace.metanets.probes import STEPS, Probes
from weightspace.metanets.readout import GraphReadout, cell_mean, relative_scales
from weightspace.metanets.structure import (
    BLOCK_FEATURES,
    COORDINATES,
    NODE_FEATURES,
    VECTOR_FEATURES,
    structure_of,
)

_VALUE_FEATURES = 4
# Elements of gated states that are made at once.
_CACHED = 1 << 19


class OperatorMetanet(Metanet):
    """Operator message passing with a read-out of the whole graph: ``(networks, outputs)``.

    - ``width``: d, size of the state of a neuron; ``rounds`` of message passing; ``hidden`` size of the MLPs.
    - ``models``: networks on one wiring that are read together; the first is the base, the others count as
      differences from it, and pairs of them have channels of their own.
    - ``probes``: learned inputs that are followed through the network (see ``weightspace.metanets.probes``); 0: none.
    - ``transfer``: leave out what changes with width (the scale of a block), so that a network widened by
      duplicating neurons gets the same outputs, and one trained at one width can be used at others.
    - ``scale``: read every network at the canonical point of its orbit under positive rescaling and, for odd
      activations, sign flips; the outputs are then invariant to those as well.
    - ``embedding``: size of the embedding that the last layer reads.

    Graphs need a wiring. Raises ``MetanetError`` for weights that are not finite.
    """

    def __init__(
        self,
        outputs: int = 1,
        *,
        width: int = 64,
        rounds: int = 4,
        hidden: int | None = None,
        models: int = 1,
        probes: int = 32,
        transfer: bool = False,
        scale: bool = False,
        embedding: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(outputs, width, rounds, models, embedding) < 1:
            raise MetanetError("outputs, width, rounds, models and embedding must be at least 1")
        self.config: dict[str, Any] = {
            "kind": "operator", "outputs": outputs, "width": width, "rounds": rounds, "hidden": hidden,
            "models": models, "probes": probes, "transfer": transfer, "scale": scale, "embedding": embedding,
            "dropout": dropout,
        }  # fmt: skip
        self.models, self.transfer, self.scale = models, transfer, scale
        self.channels = channel_count(models)
        self.probes = Probes(probes, STEPS) if probes else None
        self.probe_in = nn.Linear(max(probes, 1), width, bias=False)
        self.node_in = nn.Linear(NODE_FEATURES, width)
        self.value_in = nn.Sequential(
            nn.Linear(VECTOR_FEATURES + _VALUE_FEATURES * models, width), nn.GELU(), nn.Linear(width, width)
        )
        attributes = BLOCK_FEATURES + (0 if transfer else 2 * models)
        self.rounds = nn.ModuleList(
            Round(width, hidden or 2 * width, self.channels, attributes, dropout) for _ in range(rounds)
        )
        self.out_norm = nn.LayerNorm(width)
        self.state_width = width + probes
        self.readout = GraphReadout(self.state_width, embedding, outputs, dropout, models=models, transfer=transfer)

    # ---------------------------------------------------------------- the contract

    def prepare(self, graph: ParameterGraph, *others: ParameterGraph, lazy: bool | None = None) -> Item:
        """What is needed of one network (of ``models`` networks on one wiring); see ``batch.prepare``.

        ``lazy=True`` leaves all blocks in their file, for models larger than memory.
        """
        graphs = [graph, *others]
        if len(graphs) != self.models:
            raise MetanetError(f"this metanet reads {self.models} networks on one wiring, found {len(graphs)}")
        if self.scale:
            graphs = [_canonical(g) for g in graphs]
        return prepare(graphs, structure_of(graph), lazy)

    @property
    def preparation(self) -> Hashable:
        return "operator", self.models, self.scale

    def collate(self, items: Sequence[Item]) -> Batch:
        return collate(items)

    def forward(self, batch: Batch) -> Tensor:
        found: Tensor = self.readout.head(self.embed(batch))
        return found

    # ---------------------------------------------------------------- states

    def embed(self, batch: Batch) -> Tensor:
        """One embedding per network, ``(networks, embedding)``."""
        found: Tensor = self.readout(self.states(batch), batch)
        return found

    def states(self, batch: Batch) -> Tensor:
        """The state of every axis element in the order of the batch, ``(nodes, state_width)``.

        The last ``probes`` columns are its values for the learned inputs.
        """
        dtype = self.node_in.weight.dtype
        if batch.models != self.models:
            raise MetanetError(f"this metanet reads {self.models} networks on one wiring, found {batch.models}")
        h: Tensor = self.node_in(batch.nodes.to(dtype))
        if batch.values.numel():
            row = torch.cat((batch.value_features.to(dtype), _value_features(batch.values.to(dtype))), dim=1)
            h = h.index_add(0, batch.value_node, self.value_in(row).to(h.dtype))
        prepared = [Operators(b, self.transfer, dtype) for b in batch.buckets]
        values = h[:, :0]
        if self.probes is not None:
            values = self.probes(batch, prepared)
            h = h + self.probe_in(values)
        for step in self.rounds:
            h = step(h, batch, prepared)
        return torch.cat((self.out_norm(h), values), dim=1)


class Operators:
    """The channels of one bucket, made once per batch and used in every round.

    ``forward_scale`` and ``backward_scale (B, channels)`` multiply the messages along and against the edges.
    """

    def __init__(self, bucket: Bucket, transfer: bool, dtype: torch.dtype) -> None:
        self.bucket = bucket
        scales = bucket.scales.to(torch.float64).clamp_min(1e-30)
        fan_out, fan_in, positions, lookup = bucket.fans.to(torch.float64).unbind(1)
        attributes = [bucket.features.to(dtype)]
        if not transfer:
            attributes.append(relative_scales(scales, fan_in * positions).to(dtype))
        self.attributes = torch.cat(attributes, dim=1)
        self.coordinates = bucket.coordinates.to(dtype)
        # A table of lookups is read one row at a time: its sums are over rows that never meet.
        natural = torch.where(lookup > 0, fan_in.rsqrt(), torch.ones_like(fan_in))
        self.natural = natural.to(dtype)
        self.forward_scale = _channel_scales(scales, natural, fan_in * positions).to(dtype)
        self.backward_scale = _channel_scales(scales, fan_in / fan_out * natural, fan_out * positions).to(dtype)
        self.channels: tuple[Tensor, Tensor] | None = None
        if bucket.weight is not None:
            found = channels(bucket.weight.to(dtype))
            along = found.permute(0, 2, 1, 4, 3).flatten(2)  # (B, out, channels · positions · in)
            self.channels = along, found.permute(0, 3, 1, 4, 2).flatten(2)  # and (B, in, channels · positions · out)


class Round(nn.Module):
    """One round of operator message passing over a batch."""

    def __init__(self, width: int, hidden: int, channels: int, attributes: int, dropout: float) -> None:
        super().__init__()
        self.width, self.channels = width, channels
        self.norm = nn.LayerNorm(width)
        self.send = nn.Linear(width, 4 * width, bias=False)
        self.place = nn.Linear(COORDINATES, 2 * channels * width)
        self.attribute = nn.Linear(attributes, 2 * channels * width)
        self.inner = nn.Linear(3 * width, hidden)
        self.context = nn.Linear(width, hidden, bias=False)
        self.outer = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.place.weight, std=0.3)
        nn.init.normal_(self.place.bias, std=0.7)
        nn.init.zeros_(self.attribute.bias)

    def forward(self, h: Tensor, batch: Batch, operators: Sequence[Operators]) -> Tensor:
        """States ``(nodes, width)`` after the round."""
        normal = self.norm(h)
        along, against = self.messages(normal, batch, operators)
        inner = self.inner(torch.cat((normal, along, against), dim=1))
        inner = inner + self.context(cell_mean(normal, batch.cell, len(batch.cell_network)))[batch.cell]
        moved: Tensor = h + self.outer(self.dropout(nn.functional.gelu(inner)))
        return moved

    def messages(self, normal: Tensor, batch: Batch, operators: Sequence[Operators]) -> tuple[Tensor, Tensor]:
        """What every node hears along and against the edges, ``(nodes, width)`` each.

        Compressed to the square root: a network with wild weights stays readable, and no sign is lost.
        """
        linked = batch.links.numel() > 0
        weight = self.send.weight if linked else self.send.weight[: 2 * self.width]
        sent = nn.functional.linear(normal, weight).split(self.width, dim=1)
        down, up = sent[:2]
        along, against = torch.zeros_like(down), torch.zeros_like(up)
        for op in operators:
            gate_along, gate_against = self.gates(op)
            if op.channels is not None:
                a, b = _bucket_messages(op, down, up, gate_along, gate_against)
            else:
                a, b = _streamed_messages(op, down, up, gate_along, gate_against)
            along = along.index_add(0, op.bucket.dst.flatten(), a.flatten(0, 1).to(along.dtype))
            against = against.index_add(0, op.bucket.src.flatten(), b.flatten(0, 1).to(against.dtype))
        if linked:
            inner, outer = batch.links
            along = along.index_add(0, outer, sent[2][inner])
            count = torch.bincount(inner, minlength=len(normal)).clamp_min(1).to(up.dtype).unsqueeze(1)
            against = against + torch.zeros_like(up).index_add(0, inner, sent[3][outer]) / count
        return _compressed(along), _compressed(against)

    def gates(self, op: Operators) -> tuple[Tensor, Tensor]:
        """``a`` and ``b``, with the scales of the channels: ``(B, channels, positions, width)`` each."""
        places = self.place(op.coordinates).view(-1, 2, self.channels, self.width).permute(1, 2, 0, 3).contiguous()
        own = 1 + self.attribute(op.attributes).view(-1, 2, self.channels, self.width)
        along = places[0] * (own[:, 0] * op.forward_scale.unsqueeze(2)).unsqueeze(2)
        against = places[1] * (own[:, 1] * op.backward_scale.unsqueeze(2)).unsqueeze(2)
        return along, against


# -------------------------------------------------------------------- channels


def channel_count(models: int) -> int:
    """Number of pointwise channels for so many models on one wiring."""
    return 3 * models + models * (models - 1) // 2


def channels(weight: Tensor) -> Tensor:
    """Pointwise channels of weights, models in dim 1: ``w``, ``|w|``, ``w²`` of each, products of pairs."""
    parts = [weight, weight.abs(), weight.square()]
    pairs = list(combinations(range(weight.shape[1]), 2))
    if pairs:
        parts.append(torch.stack([weight[:, i] * weight[:, j] for i, j in pairs], dim=1))
    return torch.cat(parts, dim=1)


def _channel_scales(scales: Tensor, natural: Tensor, count: Tensor) -> Tensor:
    """What each channel is multiplied by, ``(B, channels)``: sums for w, means over the block's own for the rest."""
    models = scales.shape[1]
    size, square = scales[:, :, 0], scales[:, :, 1]
    parts = [natural.unsqueeze(1).expand(-1, models), 1 / (size * count.unsqueeze(1))]
    parts.append(1 / (square * count.unsqueeze(1)))
    pairs = [(square[:, i] * square[:, j]).rsqrt() / count for i, j in combinations(range(models), 2)]
    return torch.cat([*parts, *(p.unsqueeze(1) for p in pairs)], dim=1)


def _compressed(x: Tensor) -> Tensor:
    """Odd, the identity near zero, and of the order of √|x| far from it."""
    return x / (1 + x.abs()).sqrt()


def _value_features(values: Tensor) -> Tensor:
    """Features of vector elements ``(T, models)``: ``(T, 4 models)``."""
    size = values.abs()
    return torch.cat((torch.asinh(values), torch.asinh(4 * values), torch.asinh(size), (size + 1e-4).log() / 4), dim=1)


# -------------------------------------------------------------------- products


def _bucket_messages(
    op: Operators, down: Tensor, up: Tensor, gate_along: Tensor, gate_against: Tensor
) -> tuple[Tensor, Tensor]:
    """Messages of a bucket to its destinations ``(B, out, d)`` and sources ``(B, in, d)``."""
    assert op.channels is not None
    bucket, width = op.bucket, down.shape[1]
    (stack, out), inner = bucket.dst.shape, bucket.src.shape[1]
    source = down[bucket.src.flatten()].view(stack, 1, 1, inner, width)
    target = up[bucket.dst.flatten()].view(stack, 1, 1, out, width)
    heard_along = _products(op.channels[0], source, gate_along.unsqueeze(3))
    heard_against = _products(op.channels[1], target, gate_against.unsqueeze(3))
    return heard_along, heard_against


def _products(weights: Tensor, states: Tensor, gates: Tensor) -> Tensor:
    """``Σ weights (states ⊙ gates)`` for a stack of matrices, one long sum over channels, positions and neurons.

    In pieces whose gated states stay in the cache: written to memory as a whole, they cost more than the products.
    """
    step = max(1, _CACHED // (weights.shape[2] * states.shape[-1]))
    parts = [
        torch.bmm(w.to(x.dtype), (x * g).reshape(len(w), w.shape[2], -1))
        for w, x, g in zip(weights.split(step), states.split(step), gates.split(step), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _streamed_messages(
    op: Operators, down: Tensor, up: Tensor, gate_along: Tensor, gate_against: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for a block that is read in chunks of rows, once for both directions."""
    bucket = op.bucket
    assert bucket.rows is not None
    read = bucket.rows
    stack, out = bucket.dst.shape
    inner, positions, width = bucket.src.shape[1], bucket.coordinates.shape[0], down.shape[1]
    step = max(1, CHUNK // (inner * positions))

    def piece(matrix: int, start: int, stop: int, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        weight = read(matrix, start, stop).to(device=source.device, dtype=source.dtype).unsqueeze(0)
        along, against = source.new_zeros(stop - start, width), source.new_zeros(inner, width)
        gates = gate_along[matrix], gate_against[matrix]
        # One channel at a time: a chunk exists once, not once per channel.
        for c, w in enumerate(_one_by_one(weight)):
            flat = w.flatten(1)
            along = along + flat @ (source.unsqueeze(1) * gates[0][c]).flatten(0, 1)
            back = (flat.T @ target[start:stop]).view(inner, positions, width)
            against = against + (back * gates[1][c]).sum(1)
        return along, against

    alongs, againsts = [], []
    for matrix in range(stack):
        source, target = down[bucket.src[matrix]], up[bucket.dst[matrix]]
        rows, total = [], source.new_zeros(inner, width)
        for start in range(0, out, step):
            arguments = (matrix, start, min(start + step, out), source, target)
            if torch.is_grad_enabled():
                a, b = checkpoint(piece, *arguments, use_reentrant=False)
            else:
                a, b = piece(*arguments)
            rows.append(a)
            total = total + b
        alongs.append(torch.cat(rows))
        againsts.append(total)
    return torch.stack(alongs), torch.stack(againsts)


def _one_by_one(weight: Tensor) -> Any:
    """The channels of ``channels``, each ``(rows, in, positions)``, made when they are asked for."""
    models = weight.shape[1]
    for fn in (lambda w: w, torch.abs, torch.square):
        for m in range(models):
            yield fn(weight[0, m])
    for i, j in combinations(range(models), 2):
        yield weight[0, i] * weight[0, j]


def _canonical(graph: ParameterGraph) -> ParameterGraph:
    from weightspace.metanets.orbit import canonical

    return canonical(graph)

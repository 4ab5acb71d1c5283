"""The operator metanet over ``edge_index``: the same function, an edge per weight, on torch_geometric.

It holds a message per weight, so it is slow and large; it exists because it is plain to read. The tests hold
the operator form against it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from weightspace.metanets.batch import Batch
from weightspace.metanets.operator import OperatorMetanet, Operators, Round, _compressed, _value_features, channels
from weightspace.metanets.probes import Probes, activated, bounded
from weightspace.metanets.readout import cell_mean
from weightspace.metanets.structure import POINTWISE


class _Sum(MessagePassing):  # type: ignore[misc]
    """Along every edge: Σ_c φ_c(w) a_c ⊙ x_source, summed where the edges end."""

    def __init__(self) -> None:
        super().__init__(aggr="add")

    def forward(self, x: Tensor, edge_index: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        """x ``(nodes, d)``, edge_index ``(2, E)``, weight ``(E, channels)``, gate ``(E, channels, d)``."""
        found: Tensor = self.propagate(edge_index, x=x, weight=weight, gate=gate, size=(len(x), len(x)))
        return found

    def message(self, x_j: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return x_j * torch.einsum("ec,ecd->ed", weight, gate)


class EdgeReference(nn.Module):
    """The outputs of an ``OperatorMetanet``, computed edge by edge with the same parameters.

    ``EdgeReference(metanet)(batch)`` equals ``metanet(batch)`` to rounding, ``(networks, outputs)``.
    """

    def __init__(self, metanet: OperatorMetanet) -> None:
        super().__init__()
        self.metanet = metanet
        self.sum = _Sum()

    def forward(self, batch: Batch) -> Tensor:
        found: Tensor = self.metanet.readout.head(self.metanet.readout(self.states(batch), batch))
        return found

    def states(self, batch: Batch) -> Tensor:
        """States of all axis elements, ``(nodes, state_width)``."""
        net = self.metanet
        dtype = net.node_in.weight.dtype
        h: Tensor = net.node_in(batch.nodes.to(dtype))
        if batch.values.numel():
            row = torch.cat((batch.value_features.to(dtype), _value_features(batch.values.to(dtype))), dim=1)
            h = h.index_add(0, batch.value_node, net.value_in(row))
        edges = [_edges(b) for b in batch.buckets]
        operators = [Operators(b, net.transfer, dtype) for b in batch.buckets]
        values = h[:, :0]
        if net.probes is not None:
            values = self._probes(net.probes, batch, edges, operators)
            h = h + net.probe_in(values)
        for step in net.rounds:
            assert isinstance(step, Round)
            normal = step.norm(h)
            down, up, part, whole = step.send(normal).chunk(4, dim=1)
            along, against = torch.zeros_like(down), torch.zeros_like(up)
            for (index, weight, stack, position), op in zip(edges, operators, strict=True):
                forward, backward = step.gates(op)
                phi = channels(weight.to(dtype).unsqueeze(0).unsqueeze(-1)).squeeze(-1).squeeze(0).T
                along = along + self.sum(down, index, phi, forward[stack, :, position])
                against = against + self.sum(up, index.flip(0), phi, backward[stack, :, position])
            if batch.links.numel():
                inner, outer = batch.links
                along = along.index_add(0, outer, part[inner])
                share = 1 / torch.bincount(inner, minlength=len(h)).to(dtype)[inner]
                against = against.index_add(0, inner, whole[outer] * share.unsqueeze(1))
            mixed = step.inner(torch.cat((normal, _compressed(along), _compressed(against)), dim=1))
            mixed = mixed + step.context(cell_mean(normal, batch.cell, len(batch.cell_network)))[batch.cell]
            h = h + step.outer(step.dropout(nn.functional.gelu(mixed)))
        return torch.cat((net.out_norm(h), values), dim=1)

    def _probes(self, probes: Probes, batch: Batch, edges: list[Any], operators: list[Operators]) -> Tensor:
        dtype = probes.input.weight.dtype
        given = probes.input(batch.nodes.to(dtype))
        fed = batch.marks[batch.cell, :1].bool()
        factor, shift = batch.affine[:, :1].to(dtype), batch.affine[:, 1:].to(dtype)
        values = torch.where(fed, given, 0)
        for _ in range(probes.steps):
            heard = torch.zeros_like(values)
            for (index, weight, stack, position), op in zip(edges, operators, strict=True):
                gate = (1 + probes.texture(op.coordinates[:, 1:]))[position] * op.natural[stack].unsqueeze(1)
                heard = heard + self.sum(values, index, weight[:1].T.to(dtype), gate.unsqueeze(1))
            heard = heard.index_add(0, batch.links[1], values[batch.links[0]])
            heard = factor * heard + shift
            rows = [
                activated(POINTWISE[k], x, f.to(dtype)) if k >= 0 else x
                for k, f, x in zip(batch.activation.tolist(), batch.frequency, heard, strict=True)
            ]
            values = torch.where(fed, given, bounded(torch.stack(rows)))
        return values


def _edges(bucket: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every weight of a bucket as an edge: index ``(2, E)``, weights ``(models, E)``, its matrix and position."""
    stack, out = bucket.dst.shape
    inner, positions = bucket.src.shape[1], bucket.coordinates.shape[0]
    weight = bucket.weight
    if weight is None:
        weight = torch.stack([bucket.rows(m, 0, out) for m in range(stack)])
    grid = torch.cartesian_prod(*(torch.arange(n) for n in (stack, out, inner, positions)))
    b, o, i, p = grid.T
    return torch.stack((bucket.src[b, i], bucket.dst[b, o])), weight.transpose(0, 1).flatten(1), b, p

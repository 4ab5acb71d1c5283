"""Probes over edges: what a network would answer to a few learned inputs, for the reference metanetworks.

The same as ``weightspace.metanets.probes``, whose values it gives to rounding where no kernel has a texture; here a
step is one sum over the edges. Neural graphs were published with such features of their nodes (Kofinas et al. 2024),
there from a forward pass of the network itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weightspace.errors import MetanetError
from weightspace.metanets.probes import STEPS, activations, passed
from weightspace.metanets.pyg_features import KINDS, WIDTH, Batch
from weightspace.metanets.structure import COORDINATES, DEPTH_FEATURES, ROLES

_PLACES = slice(DEPTH_FEATURES + len(ROLES) + 1, DEPTH_FEATURES + len(ROLES) + COORDINATES)


class EdgeProbes(nn.Module):
    """Values ``(nodes, count)`` of all nodes for ``count`` learned inputs; nodes that stand for a tensor have zeros.

    All nodes step at once, ``STEPS`` times: after as many steps as a network has layers its values are right and stay
    so. A kernel is seen by each probe through a learned texture, over its grid or, with an edge per weight, over
    the features of its place. Biases and norms are applied as a factor and a shift (``Batch.affine``).
    """

    def __init__(self, kernel: int, count: int, steps: int = STEPS) -> None:
        super().__init__()
        if not isinstance(count, int) or count < 1:
            raise MetanetError(f"probes={count!r}; expected a positive integer, or 0 for none")
        self.count, self.steps = count, steps
        self.input = nn.Linear(WIDTH, count)
        self.texture = nn.Parameter(torch.zeros(kernel**2, count)) if kernel > 1 else None
        self.place = nn.Linear(COORDINATES - 1, count, bias=False) if kernel == 1 else None
        nn.init.normal_(self.input.weight, std=0.15)
        if self.texture is not None:
            nn.init.normal_(self.texture, std=0.2)
        if self.place is not None:
            nn.init.normal_(self.place.weight, std=0.2)

    def forward(self, batch: Batch) -> Tensor:
        """Values after the last step; inputs keep theirs. The batch needs ``affine``."""
        given = self.input(batch.nodes)
        fed = (batch.node_mark == 1).unsqueeze(1)
        weight, (src, dst) = self._weights(batch)
        frequency = batch.frequency.unsqueeze(1)
        factor, shift = batch.affine.unsqueeze(2).unbind(1)
        kinds = activations(batch.activation)
        values = torch.where(fed, given, 0)
        for _ in range(self.steps):
            heard = torch.zeros_like(values).index_add(0, dst, weight * values.index_select(0, src))
            values = torch.where(fed, given, passed(factor * heard + shift, kinds, frequency))
        return values

    def _weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of every edge that carries values what they are multiplied by, ``(E', count)``, and its ends ``(2, E')``."""
        block, vector, link = (batch.types[:, k - len(KINDS)] > 0 for k in range(len(KINDS)))
        carry = ~vector[batch.edge_type]
        kind, index = batch.edge_type[carry], batch.edge_index[:, carry]
        if self.texture is not None:
            weight = batch.edges[carry] @ (1 + self.texture)
        else:
            assert self.place is not None
            weight = batch.edges[carry] * (1 + self.place(batch.types[:, _PLACES]))[kind]
        lookup = (batch.type_role == ROLES.index("lookup")) & block
        if bool(lookup.any()):
            # A table of lookups is read one row at a time: its sums are over rows that never meet.
            own = lookup[kind].to(weight.dtype)
            rows = torch.zeros(batch.num_nodes, dtype=weight.dtype, device=weight.device).index_add(0, index[1], own)
            share = rows.clamp_min(1).rsqrt()[index[1]]
            weight = weight * torch.where(lookup[kind], share, 1.0).unsqueeze(1)
        # What is part of something passes its values on as they are.
        return torch.where(link[kind].unsqueeze(1), 1.0, weight), index

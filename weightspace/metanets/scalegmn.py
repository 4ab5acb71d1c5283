"""Scale-equivariant graph metanetworks, ScaleGMN (Kalogeropoulos et al. 2024), correct in both directions.

A network stays the same function when a ReLU neuron's incoming weights and bias are multiplied by ``s > 0`` and its
outgoing weights divided by it (by ``s = ±1`` for an odd activation). So node ``i`` has a scale ``s_i``, and a weight
from ``j`` to ``i`` has **grades** ``(a, b)``: it is multiplied by ``s_i^a s_j^b``, mostly ``(1, -1)``. Which nodes have
a scale and which grades the tensors have is read from the network (``weightspace.wiring.scaling``).

Every node has a state of each grade: ``z`` (grade 0, invariant), ``h`` (grade 1, as its bias) and ``g`` (grade -1,
as the weights that leave it). An edge state ``e`` has the grades of its weight. Then

    along:    e ⊙ (state of j of grade -b)   has grade a in s_i:  h_j → h_i, or h_j → z_i where i has no scale
    against:  e ⊙ (state of i of grade -a)   has grade b in s_j:  g_i → g_j, or z_i → g_j where i has no scale

are both exact, with no division by a weight: the second carries to a neuron what its outgoing weights do, as a
gradient does. Sums and linear maps within a grade keep it. Everything nonlinear is a function of invariants: ``z``,
directions ``h / |h|`` and ``g / |g|``, products ``h ⊙ g`` and ``(g_i or z_i) ⊙ e ⊙ (h_j or z_j)``; under signs,
absolute values of linear maps of ``h``, ``g`` and ``e``. Invariants gate the states of all grades.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weightspace.errors import MetanetError
from weightspace.metanets.pyg_features import (
    TYPE_FEATURES,
    WIDTH,
    Batch,
    Item,
    item_of,
    tables_of,
)
from weightspace.metanets.pyg_layers import (
    EdgeHidden,
    ReferenceMetanet,
    RunningScale,
    checked,
    mlp,
    pooled,
    scatter,
)
from weightspace.metanets.pyg_probes import EdgeProbes

if TYPE_CHECKING:
    from weightspace.graph import ParameterGraph

SYMMETRIES = ("both", "scale", "sign")
DIRECTIONS = ("forward", "both")
# Grades are counted modulo 3 where they number the states: z 0, h 1, g -1 = 2.
_GRADES = 3


class ScaleGmn(ReferenceMetanet):
    """The scale-equivariant graph metanetwork of Kalogeropoulos et al. (2024, "Scale Equivariant Graph
    Metanetworks"); see the module's head for what makes ``direction="both"`` equivariant here.

    ``direction="forward"`` sends messages along the edges only. ``symmetry``: positive rescalings (``"scale"``),
    sign flips (``"sign"``), or both, each where the network has it. Neurons without either are treated as in an
    ordinary graph network. An edge is a pair of channels with its kernel on a grid ``kernel`` × ``kernel``.

    ``probes``: learned inputs whose values in every neuron are features of it, as in ``NeuralGraphs`` and not in the
    paper. A value flips its sign with its neuron, but is bounded and so keeps no positive scale: networks that have
    such scales are refused then.

    The defaults are those of the authors' small CNN experiments, 4 layers of width 128 (64 on implicit neural
    representations); ``ScaleGmn(hidden=16, layers=3)`` is a small one. Invariant to permutations and rescalings.
    """

    def __init__(
        self, outputs: int = 1, hidden: int = 128, layers: int = 4, dropout: float = 0.0, kernel: int = 7,
        direction: str = "both", symmetry: str = "both", probes: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = checked(
            {"kind": "scalegmn", "outputs": outputs, "hidden": hidden, "layers": layers, "dropout": dropout,
             "kernel": kernel, "direction": direction, "symmetry": symmetry, "probes": probes}
        )  # fmt: skip
        for name, value, known in (("direction", direction, DIRECTIONS), ("symmetry", symmetry, SYMMETRIES)):
            if value not in known:
                raise MetanetError(f"{name} can be {', '.join(known)}; found {value!r}")
        self.kernel = kernel
        self.symmetry = symmetry
        # All rescalings that a network has, or only those of one kind.
        self.scale = symmetry == "both"
        self.probes = EdgeProbes(kernel, probes) if probes else None
        self.heard = nn.Linear(probes, hidden, bias=False) if probes else None
        self.start = _Encoder(kernel, hidden)
        self.first = _Invariants(hidden)
        self.layers = nn.ModuleList(
            _Layer(hidden, dropout, direction == "both", i == layers - 1) for i in range(layers)
        )
        self.head = mlp(3 * (hidden + probes), 2 * hidden, outputs, dropout)

    def prepare(self, graph: ParameterGraph) -> Item:
        """The weights of a network laid end to end; what its rescalings do is found once per wiring.

        Raises ``MetanetError`` for a graph without weights or wiring, or with too many edges to materialise, and
        ``UnprovedWiringError`` for a wiring that is not proved: its symmetries are not known.
        """
        tables = tables_of(graph, self.kernel, self.vectors, self.symmetry)
        if self.probes is not None:
            assert tables.symmetry is not None
            if bool(tables.symmetry.positive.any()) or len(tables.nodes) > graph.num_nodes:
                raise MetanetError(
                    f"this network ({graph.origin}) has neurons that may be rescaled, and values of probes do not keep "
                    "that; take scalegmn without probes, with symmetry='sign', or another metanet"
                )
        return item_of(graph, tables, self.probes is not None)

    def forward(self, batch: Batch) -> Tensor:
        batch = batch.as_type(self.dtype)
        edges = _Edges(batch)
        states, e = self.start(batch, edges)
        values = self.values(batch)
        if self.heard is not None:
            heard, signed = self.heard(values), _signed(batch)
            states = torch.stack((states[0] + heard * ~signed, states[1] + heard * signed, states[2]))
        inner = self.first(states, edges)
        for layer in self.layers:
            states, e, inner = layer(states, e, inner, edges)
        found: Tensor = self.head(pooled(torch.cat((inner, _even(values, edges.signed)), dim=1), batch))
        return found


# -------------------------------------------------------------------- edges and their grades


class _Edges:
    """Where along- and against-messages of a batch start and end, as rows of the states ``(3 N, d)``."""

    def __init__(self, batch: Batch) -> None:
        symmetry = batch.symmetry
        assert symmetry is not None
        n = batch.num_nodes
        src, dst = batch.edge_index
        a, b = symmetry.grades[batch.edge_type].unbind(dim=1)
        self.index = batch.edge_index
        self.nodes = n
        self.from_src = -b % _GRADES * n + src
        self.from_dst = -a % _GRADES * n + dst
        self.to_dst = a % _GRADES * n + dst
        self.to_src = b % _GRADES * n + src
        self.positive = symmetry.positive.unsqueeze(1)
        self.edge_positive = ((a != 0) & symmetry.positive[dst] | (b != 0) & symmetry.positive[src]).unsqueeze(1)
        self.signed = self.edge_signed = None
        if bool(symmetry.signed.any()):
            self.signed = symmetry.signed.unsqueeze(1)
            self.edge_signed = ((a != 0) & symmetry.signed[dst] | (b != 0) & symmetry.signed[src]).unsqueeze(1)
        # Sums of n independent terms grow with the root of n.
        self.at_dst = scatter(torch.ones_like(self.to_dst).unsqueeze(1), self.to_dst, _GRADES * n, "sum").clamp(min=1)
        self.at_src = scatter(torch.ones_like(self.to_src).unsqueeze(1), self.to_src, _GRADES * n, "sum").clamp(min=1)


def _per_length(x: Tensor, where: Tensor) -> Tensor:
    """One over the length of each row where asked for, else 1, ``(n, 1)``; 0 for rows of zeros, without a gradient."""
    # In double precision: the gradient goes with the inverse cube of a length that may be tiny. Where it would not
    # fit into single precision any more, a row counts as zeros.
    square = x.to(torch.float64).square().sum(dim=1, keepdim=True)
    some = square > (torch.finfo(x.dtype).tiny if x.dtype == torch.float64 else 1e-30)
    return torch.where(where, torch.where(some, torch.where(some, square, 1.0).rsqrt(), 0.0), 1.0).to(x.dtype)


def _signed(batch: Batch) -> Tensor:
    """Which nodes may flip their sign, ``(N, 1)``."""
    assert batch.symmetry is not None
    return batch.symmetry.signed.unsqueeze(1)


def _even(x: Tensor, where: Tensor | None) -> Tensor:
    return x if where is None else torch.where(where, x.abs(), x)


class _Encoder(nn.Module):
    """First states: ``(3, N, d)`` of the nodes and ``(E, d)`` of the edges, linear in what has a grade."""

    def __init__(self, kernel: int, hidden: int) -> None:
        super().__init__()
        self.nodes = mlp(WIDTH, hidden, hidden)
        self.entry_scale, self.edge_scale = RunningScale(), RunningScale()
        self.entry_values = nn.Linear(kernel**2, hidden, bias=False)
        self.edge_values = nn.Linear(kernel**2, hidden, bias=False)
        self.entry_types, self.edge_types = nn.Linear(TYPE_FEATURES, hidden), nn.Linear(TYPE_FEATURES, hidden)
        self.mix = mlp(hidden, hidden, hidden)
        self.plain = nn.Linear(TYPE_FEATURES, hidden)

    def forward(self, batch: Batch, edges: _Edges) -> tuple[Tensor, Tensor]:
        assert batch.symmetry is not None
        grades, types = batch.symmetry.grades, batch.types
        kind = batch.entry_type
        values = self.entry_values(self.entry_scale(batch.entries, batch.type_role[kind]))
        linear = values * (1 + self.entry_types(types)[kind])
        grade = grades[kind, 0]
        each = torch.where((grade == 0).unsqueeze(1), self.mix(linear + self.plain(types)[kind]), linear)
        n = batch.num_nodes
        states = scatter(each, grade % _GRADES * n + batch.entry_node, _GRADES * n, "sum").reshape(_GRADES, n, -1)
        states = torch.cat(((states[0] + self.nodes(batch.nodes)).unsqueeze(0), states[1:]))
        kind = batch.edge_type
        e = self.edge_values(self.edge_scale(batch.edges, batch.type_role[kind])) * (1 + self.edge_types(types)[kind])
        free = (grades == 0).all(dim=1, keepdim=True)
        return states, e + torch.where(free, self.plain(types), 0.0)[kind]


class _Invariants(nn.Module):
    """Invariants of each node ``(N, d)`` from its states of all grades ``(3, N, d)``."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.plain = nn.Linear(hidden, hidden)
        self.turned = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.factors = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.product = nn.Linear(hidden, hidden, bias=False)

    def forward(self, states: Tensor, edges: _Edges) -> Tensor:
        z, *graded = states
        found: Tensor = self.plain(z)
        for x, turn in zip(graded, self.turned, strict=True):
            found = found + _even(turn(x * _per_length(x, edges.positive)), edges.signed)
        (h, g), (of_h, of_g) = graded, self.factors
        found = found + self.product(torch.asinh(of_h(h) * of_g(g)))
        return nn.functional.silu(found)


class _Layer(nn.Module):
    def __init__(self, hidden: int, dropout: float, both: bool, last: bool) -> None:
        super().__init__()
        self.both = both
        # One map per grade; those of h and g have no bias.
        self.sent = nn.Parameter(_maps(_GRADES, hidden, 2 * hidden if both else hidden))
        self.come = nn.Parameter(_maps(_GRADES, 2 * hidden if both else hidden, hidden))
        self.maps = nn.Linear(hidden, (2 if last else 3) * hidden, bias=False)
        self.edge = EdgeHidden(hidden, 2 * hidden if both else hidden, hidden)
        self.gates = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, (2 + both - last) * hidden))
        self.inner = _Invariants(hidden)
        self.out = mlp(hidden, hidden, _GRADES * hidden, dropout) if not last else None

    def forward(self, states: Tensor, e: Tensor, inner: Tensor, edges: _Edges) -> tuple[Tensor, Tensor, Tensor]:
        weight, seen, *change = self.maps(e).split(e.shape[1], dim=1)
        seen = _even(seen * _per_length(e, edges.edge_positive), edges.edge_signed)
        sent = (states @ self.sent).flatten(0, 1)
        d = e.shape[1]
        come = sent[:, :d].index_select(0, edges.from_src)
        along = come * weight
        if self.both:
            back = sent[:, d:].index_select(0, edges.from_dst)
            against = back * weight
            seen = torch.cat((seen, torch.asinh(along * back)), dim=1)
        gates = 1 + self.gates(self.edge(inner, seen, edges.index))
        size = _GRADES * edges.nodes
        gathered = scatter(along * gates[:, :d], edges.to_dst, size, "sum") / edges.at_dst.sqrt()
        if self.both:
            returned = scatter(against * gates[:, d : 2 * d], edges.to_src, size, "sum") / edges.at_src.sqrt()
            gathered = torch.cat((gathered, returned), dim=1)
        gathered = gathered.reshape(_GRADES, edges.nodes, -1)
        gathered = torch.cat((torch.asinh(gathered[:1]), gathered[1:]))
        states = states + gathered @ self.come
        inner = self.inner(states, edges)
        # After the last layer only invariants are read.
        if self.out is not None:
            z, h, g = self.out(inner).chunk(_GRADES, dim=1)
            states = torch.stack((states[0] + z, states[1] * (1 + h), states[2] * (1 + g)))
            e = e + change[0] * gates[:, -d:]
        return states, e, inner


def _maps(count: int, into: int, out: int) -> Tensor:
    return torch.randn(count, into, out) / math.sqrt(into)

"""Parameter graphs as tables of edges for the reference metanetworks, prepared once per wiring.

An edge is a pair of channels with its kernel as features, laid on the middle of a grid of ``kernel`` × ``kernel``
positions. Kernels that the grid cannot hold are cut into several edges between the same nodes, each with features
that say where its piece lies; with ``kernel=1`` every weight is an edge of its own. Biases, norms and the like
are **entries** of the nodes in the same form, or, where a metanetwork asks for it, edges from a node that stands
for the tensor. Only the gathering of the weights is done for each network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from weightspace.errors import MetanetError
from weightspace.graph.layout import Block, Vector
from weightspace.metanets.batch import affine_of
from weightspace.metanets.scales import Copy, Scales, scales_of
from weightspace.metanets.structure import (
    BLOCK_FEATURES,
    NODE_FEATURES,
    ROLES,
    VECTOR_FEATURES,
    Structure,
    structure_of,
)

if TYPE_CHECKING:
    from weightspace.graph import ParameterGraph

KINDS = ("block", "vector", "link")
TYPE_FEATURES = VECTOR_FEATURES + len(KINDS)
"""Role and depth of the tensor, where in its kernel the edge lies, and whether it is a block, vector or link."""

MAX_EDGES = 4_000_000
"""Edges that are materialised at most: the references hold a state for each, whole, in memory."""

WIDTH = NODE_FEATURES + BLOCK_FEATURES + 1
"""Features of a node: those of ``structure``, role and depth of what makes it, and whether it stands for a tensor."""


@dataclass(frozen=True, eq=False)
class Symmetry:
    """How the rescalings of a wiring act: ``grades (T, 2)`` exponents of a type of edge in the scale of its
    destination and of its source, ``positive (N,)`` and ``signed (N,)`` which nodes have such a scale."""

    grades: Tensor
    positive: Tensor
    signed: Tensor


@dataclass(frozen=True, eq=False)
class Tables:
    """All that networks of one wiring share: N nodes, E edges, V entries, T types of edges, P grid positions.

    ``places`` index the elements of the tensors ``names`` laid end to end, followed by a zero for empty positions.
    ``node_mark``: 0 hidden, 1 input, 2 output; ``activation`` and ``frequency`` as in ``Structure``.
    """

    names: tuple[str, ...]
    nodes: Tensor
    node_mark: Tensor
    activation: Tensor
    frequency: Tensor
    edge_index: Tensor
    edge_type: Tensor
    edge_places: Tensor
    entry_node: Tensor
    entry_type: Tensor
    entry_places: Tensor
    types: Tensor
    type_role: Tensor
    symmetry: Symmetry | None


@dataclass(frozen=True, eq=False)
class Item:
    """One network: the tables of its wiring, its weights end to end, followed by a zero, and, where asked for, what
    its vectors do to a value that passes a node, ``affine (N, 2)`` (see ``batch.affine_of``; else ``(0, 2)``)."""

    tables: Tables
    flat: Tensor
    affine: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Several networks as one graph; ``node_graph (N,)`` and ``edge_graph (E,)`` number them as they were given.

    ``edges (E, P)`` and ``entries (V, P)`` hold the weights, the other fields are those of ``Tables``.
    """

    size: int
    nodes: Tensor
    node_mark: Tensor
    activation: Tensor
    frequency: Tensor
    affine: Tensor
    node_graph: Tensor
    edge_index: Tensor
    edge_type: Tensor
    edge_graph: Tensor
    edges: Tensor
    entry_node: Tensor
    entry_type: Tensor
    entries: Tensor
    types: Tensor
    type_role: Tensor
    symmetry: Symmetry | None

    @property
    def num_nodes(self) -> int:
        return self.nodes.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device."""
        return _moved(self, lambda x: x.to(device, non_blocking=True))

    def as_type(self, dtype: torch.dtype) -> Batch:
        """The same with numbers of a floating point type."""
        return _moved(self, lambda x: x.to(dtype) if x.is_floating_point() else x)


_CACHE: WeakKeyDictionary[Structure, dict[tuple[Any, ...], Tables]] = WeakKeyDictionary()


def tables_of(graph: ParameterGraph, kernel: int, vectors: str, symmetry: str = "") -> Tables:
    """The tables of a graph, made once per wiring and form.

    ``vectors``: ``"entries"`` of the nodes, or ``"nodes"``, one per tensor, with edges. ``symmetry``: which scales
    the nodes have, ``"scale"``, ``"sign"`` or ``"both"`` (see ``weightspace.metanets.scales``); none if empty.
    """
    structure = structure_of(graph)
    known = _CACHE.setdefault(structure, {})
    key = (kernel, vectors, symmetry)
    if key not in known:
        known[key] = _build(graph, structure, *key)
    return known[key]


def item_of(graph: ParameterGraph, tables: Tables, affine: bool = False) -> Item:
    """The weights of one network for its tables, with ``affine`` where asked. What is not a number counts as zero."""
    tensors = [graph.real(name) for name in tables.names]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    flat = torch.cat([*(x.reshape(-1).to(dtype) for x in tensors), torch.zeros(1, dtype=dtype)])
    flat.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return Item(tables, flat, _affine(graph, tables, dtype) if affine else torch.empty(0, 2, dtype=dtype))


def _affine(graph: ParameterGraph, tables: Tables, dtype: torch.dtype) -> Tensor:
    structure = structure_of(graph)
    values = [graph.weight(v.vector).to(dtype).flatten() for v in structure.vectors]
    held = torch.cat([torch.empty(0, dtype=dtype), *values]).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    found = torch.tensor([1.0, 0.0], dtype=dtype).repeat(len(tables.nodes), 1)
    found[: structure.num_nodes] = affine_of(structure, held)
    return found


def batch_of(items: Sequence[Item]) -> Batch:
    """Several networks as one graph: those that share their tables are gathered at once."""
    if not items:
        raise MetanetError("no networks: a batch needs at least one")
    groups: dict[int, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(id(item.tables), []).append(i)
    parts = []
    nodes = types = 0
    for members in groups.values():
        tables = items[members[0]].tables
        own = [items[i] for i in members]
        parts.append(_repeated(tables, own, members, nodes, types))
        nodes += len(members) * tables.nodes.shape[0]
        types += tables.types.shape[0]
    return parts[0] if len(parts) == 1 else _joined(parts, len(items))


# -------------------------------------------------------------------- batches


def _repeated(tables: Tables, items: Sequence[Item], numbers: Sequence[int], nodes: int, types: int) -> Batch:
    """One group: networks with the same tables, their nodes and types counted from ``nodes`` and ``types``."""
    flat = torch.stack([item.flat for item in items])
    n, here, width = len(numbers), tables.nodes.shape[0], tables.edge_places.shape[1]
    graphs = torch.tensor(numbers)
    starts = nodes + here * torch.arange(n)
    symmetry = tables.symmetry
    return Batch(
        size=n,
        nodes=tables.nodes.repeat(n, 1),
        node_mark=tables.node_mark.repeat(n),
        activation=tables.activation.repeat(n),
        frequency=tables.frequency.repeat(n),
        affine=torch.cat([item.affine for item in items]),
        node_graph=graphs.repeat_interleave(here),
        edge_index=(tables.edge_index.unsqueeze(1) + starts.unsqueeze(1)).flatten(1),
        edge_type=(tables.edge_type + types).repeat(n),
        edge_graph=graphs.repeat_interleave(tables.edge_type.shape[0]),
        edges=flat[:, tables.edge_places].reshape(-1, width),
        entry_node=(tables.entry_node + starts.unsqueeze(1)).flatten(),
        entry_type=(tables.entry_type + types).repeat(n),
        entries=flat[:, tables.entry_places].reshape(-1, width),
        types=tables.types,
        type_role=tables.type_role,
        symmetry=symmetry and Symmetry(symmetry.grades, symmetry.positive.repeat(n), symmetry.signed.repeat(n)),
    )


def _joined(parts: Sequence[Batch], size: int) -> Batch:
    found: dict[str, Any] = {"size": size, "symmetry": None}
    for f in fields(Batch):
        if f.name not in found:
            found[f.name] = torch.cat([getattr(p, f.name) for p in parts], dim=1 if f.name == "edge_index" else 0)
    symmetries = [p.symmetry for p in parts if p.symmetry is not None]
    if symmetries:
        found["symmetry"] = Symmetry(
            torch.cat([s.grades for s in symmetries]),
            torch.cat([s.positive for s in symmetries]),
            torch.cat([s.signed for s in symmetries]),
        )
    return Batch(**found)


def _moved(batch: Batch, move: Callable[[Tensor], Tensor]) -> Batch:
    found: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(Batch)}
    if batch.symmetry is not None:
        s = batch.symmetry
        found["symmetry"] = Symmetry(move(s.grades), move(s.positive), move(s.signed))
    found |= {k: move(v) for k, v in found.items() if isinstance(v, Tensor)}
    return Batch(**found)


# -------------------------------------------------------------------- tables of a wiring


def _build(graph: ParameterGraph, structure: Structure, kernel: int, vectors: str, symmetry: str) -> Tables:
    count = sum(math.prod(b.shape[:3]) * (b.shape[3] if kernel == 1 else 1) for b in structure.blocks)
    if count > MAX_EDGES:
        raise MetanetError(
            f"the network has {count:,} edges and the reference metanetworks keep a state for each; at most "
            f"{MAX_EDGES:,} are made. The metanetwork 'operator' reads networks of any size"
        )
    scales = scales_of(graph, symmetry != "sign", symmetry != "scale") if symmetry else Scales()
    rows = _Rows(graph, kernel)
    for b in structure.blocks:
        elements = b.block.matrix(rows.elements(b.block.tensor))
        _, out, into, width = elements.shape
        to, of = graph.cells[b.block.dst], graph.cells[b.block.src]
        dst = (b.dst - to.start + scales.start(b.block, to, True)).unsqueeze(2).expand(-1, -1, into).reshape(-1)
        src = (b.src - of.start + scales.start(b.block, of, False)).unsqueeze(1).expand(-1, out, -1).reshape(-1)
        features = torch.cat((b.features.expand(width, -1), b.coordinates), dim=1)
        rows.add(False, b.block, torch.stack((src, dst)), elements.reshape(-1, width), features)
    extra: list[Tensor] = []
    for v in structure.vectors:
        elements = v.vector.matrix(rows.elements(v.vector.tensor))
        if vectors == "nodes":
            source = torch.full_like(v.node, structure.num_nodes + len(extra))
            extra.append(v.features[:, :BLOCK_FEATURES].mean(dim=0))
            rows.add(False, v.vector, torch.stack((source, v.node)), elements, v.features)
        else:
            cell = graph.cells[v.vector.dst]
            dst = v.node - cell.start + scales.start(v.vector, cell, True)
            if (v.vector.label, False) in scales.ends:
                src = v.node - cell.start + scales.start(v.vector, cell, False)
                rows.add(False, v.vector, torch.stack((src, dst)), elements, v.features)
            else:
                rows.add(True, v.vector, dst.unsqueeze(0), elements, v.features)
    links = torch.cat([structure.links, *(_to_copy(c) for c in scales.added)], dim=1)
    if links.shape[1]:
        rows.add(False, None, links, torch.empty(links.shape[1], 0, dtype=torch.long), torch.zeros(1, VECTOR_FEATURES))
    marks = structure.marks[structure.cell] @ torch.tensor([1.0, 2.0])
    nodes = torch.cat((structure.nodes, _made_by(structure)[structure.cell]), dim=1)
    nodes = torch.nn.functional.pad(nodes, (0, 1))
    if extra:
        n = len(extra)
        added = torch.cat((torch.zeros(n, NODE_FEATURES), torch.stack(extra), torch.ones(n, 1)), dim=1)
        nodes, marks = torch.cat((nodes, added)), torch.cat((marks, torch.zeros(n)))
    for c in scales.added:
        own = slice(c.cell.start, c.cell.start + c.cell.size)
        nodes, marks = torch.cat((nodes, nodes[own])), torch.cat((marks, marks[own]))
    beyond = len(nodes) - structure.num_nodes
    activation = torch.nn.functional.pad(structure.activation, (0, beyond), value=-1)
    frequency = torch.nn.functional.pad(structure.frequency, (0, beyond), value=1.0)
    flags = torch.zeros(2, len(nodes), dtype=torch.bool)
    for c in scales.copies:
        flags[:, c.start : c.start + c.cell.size] = torch.tensor([[c.positive], [c.signed]])
    grades = torch.tensor([scales.grades.get(p.label, (0, 0)) if p else (0, 0) for p in rows.parts])
    found = Symmetry(grades, *flags) if symmetry else None
    return rows.tables(nodes, marks.long(), activation, frequency, found)


def _to_copy(copy: Copy) -> Tensor:
    """Links from the nodes of a cell to those that play its part in another symmetry."""
    places = torch.arange(copy.cell.size)
    return torch.stack((places + copy.cell.start, places + copy.start))


def _made_by(structure: Structure) -> Tensor:
    """Mean role and depth of the tensors that end in each cell, ``(cells, BLOCK_FEATURES)``."""
    number = {cell.name: i for i, cell in enumerate(structure.cells)}
    total = torch.zeros(structure.num_cells, BLOCK_FEATURES)
    count = torch.zeros(structure.num_cells, 1)
    ends = [(b.block.dst, b.features) for b in structure.blocks]
    ends += [(v.vector.dst, v.features[0, :BLOCK_FEATURES]) for v in structure.vectors]
    for dst, features in ends:
        total[number[dst]] += features
        count[number[dst]] += 1
    return total / count.clamp(min=1)


class _Rows:
    """Edges and entries as they are found, and the order of the tensors that they take their weights from."""

    def __init__(self, graph: ParameterGraph, kernel: int) -> None:
        self.graph = graph
        self.kernel = kernel
        self.starts: dict[str, int] = {}
        self.total = 0
        self.edges: list[tuple[Tensor, Tensor, Tensor]] = []
        self.entries: list[tuple[Tensor, Tensor, Tensor]] = []
        self.types: list[Tensor] = []
        self.roles: list[int] = []
        self.parts: list[Vector | None] = []

    def elements(self, name: str) -> Tensor:
        """The number of every element of a tensor among those of all."""
        shape = self.graph.shapes[name]
        shape = (*shape, 2) if self.graph.dtypes[name].is_complex else shape
        if name not in self.starts:
            self.starts[name] = self.total
            self.total += math.prod(shape)
        return (self.starts[name] + torch.arange(math.prod(shape))).reshape(shape)

    def add(self, entry: bool, part: Vector | None, index: Tensor, elements: Tensor, features: Tensor) -> None:
        """Edges ``index (2, n)`` or entries ``(1, n)`` with ``elements (n, width)`` and ``features (width, F)``."""
        for columns, slots in _pieces(part, self.kernel, features):
            places = torch.full((elements.shape[0], self.kernel**2), -1)
            places[:, slots] = elements[:, columns]
            which = torch.full((elements.shape[0],), len(self.types))
            (self.entries if entry else self.edges).append((index, which, places))
            place = features[columns].mean(dim=0) if len(columns) else features[0]
            made_of = "link" if part is None else "block" if isinstance(part, Block) else "vector"
            flags = torch.tensor([float(k == made_of) for k in KINDS])
            self.types.append(torch.cat((place, flags)))
            role = self.graph.wiring.roles.get(part.tensor, "other") if part and self.graph.wiring else "other"
            self.roles.append(ROLES.index(role))
            self.parts.append(part)

    def tables(
        self, nodes: Tensor, marks: Tensor, activation: Tensor, frequency: Tensor, symmetry: Symmetry | None
    ) -> Tables:
        edge_index, edge_type, edge_places = self._joined(self.edges, 2)
        entry_index, entry_type, entry_places = self._joined(self.entries, 1)
        return Tables(
            names=tuple(self.starts),
            nodes=nodes,
            node_mark=marks,
            activation=activation,
            frequency=frequency,
            edge_index=edge_index,
            edge_type=edge_type,
            edge_places=edge_places,
            entry_node=entry_index[0],
            entry_type=entry_type,
            entry_places=entry_places,
            types=torch.stack(self.types),
            type_role=torch.tensor(self.roles),
            symmetry=symmetry,
        )

    def _joined(self, rows: list[tuple[Tensor, Tensor, Tensor]], ends: int) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.cat([torch.empty(ends, 0, dtype=torch.long), *(r[0] for r in rows)], dim=1)
        which = torch.cat([torch.empty(0, dtype=torch.long), *(r[1] for r in rows)])
        places = torch.cat([torch.empty(0, self.kernel**2, dtype=torch.long), *(r[2] for r in rows)])
        # Empty positions read the zero behind the last weight.
        return index, which, places.masked_fill(places < 0, self.total)


def _pieces(part: Vector | None, kernel: int, features: Tensor) -> list[tuple[list[int], list[int]]]:
    """Which columns of a part go together on one edge, and at which positions of the grid."""
    if part is None:
        return [([], [])]
    width, middle = part.width, (kernel // 2) * (kernel + 1)
    loops = sorted((x for x in part.loops if x.feature), key=lambda x: -x.feature)
    sizes = [x.size for x in loops if x.size > 1]
    # Positions that may be permuted are described alike, and no place on a grid is theirs.
    if width > 1 and len(torch.unique(features, dim=0)) < width:
        return [([i], [middle]) for i in range(width)]
    if len(sizes) > 2 or any(n > kernel for n in sizes):
        step = kernel**2
        ends = [(i, min(i + step, width)) for i in range(0, width, step)]
        return [(list(range(i, j)), list(range(j - i))) for i, j in ends]
    rows, columns = ([1] * (2 - len(sizes)) + sizes)[:2]
    top, left = kernel // 2 - rows // 2, kernel // 2 - columns // 2
    return [(list(range(width)), [(top + r) * kernel + left + c for r in range(rows) for c in range(columns)])]

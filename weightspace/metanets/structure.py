"""What a metanet knows of a network besides its weights: nodes, blocks, vectors and their fixed features.

Nothing here depends on the value of a weight, on the name of a tensor, or on their order in a file, so one
``Structure`` serves every network with the same wiring.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightspace.errors import MetanetError
from weightspace.graph.layout import Block, Cell, Vector, contained
from weightspace.wiring import Wiring
from weightspace.wiring.axis import Segment

if TYPE_CHECKING:
    from weightspace.graph import ParameterGraph

ROLES = ("weight", "lookup", "shift", "gain", "mean", "variance", "other")
ACTIVATIONS = (
    "relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid", "sin", "softplus", "abs", "softmax", "layer_norm",
    "rms_norm", "other",
)  # fmt: skip

# Those that act on each neuron alone.
POINTWISE = ACTIVATIONS[:10]

_GRID = 3  # places on a grid have at most three coordinates of their own
_PERIODS = tuple(2.0**k for k in range(1, 9))
_OFFSETS = (1.0, 2.0, 4.0, 8.0)
_DEPTHS = (0.5, 1.0, 2.0)

INDEX_FEATURES = 2 * len(_PERIODS) + 2
NODE_FEATURES = 3 + len(ACTIVATIONS) + _GRID * INDEX_FEATURES
COORDINATES = _GRID * (2 * len(_OFFSETS) + 1) + 1
DEPTH_FEATURES = 2 * len(_DEPTHS) + 1
BLOCK_FEATURES = DEPTH_FEATURES + len(ROLES)
VECTOR_FEATURES = DEPTH_FEATURES + len(ROLES) + COORDINATES


@dataclass(frozen=True, eq=False)
class BlockPart:
    """A block as a stack of ``shared`` matrices with kernels, ``(shared, out, in, positions)``.

    ``dst (shared, out)`` and ``src (shared, in)`` are node numbers, ``coordinates (positions, COORDINATES)``
    describe the kernel, ``features (BLOCK_FEATURES,)`` role and depth. ``key`` is equal for equal coordinates.
    ``cells``: numbers of the cells that the block leads to and comes from.
    """

    block: Block
    shape: tuple[int, int, int, int]
    dst: Tensor
    src: Tensor
    coordinates: Tensor
    features: Tensor
    key: tuple[object, ...]
    lookup: bool
    cells: tuple[int, int]


@dataclass(frozen=True, eq=False)
class VectorPart:
    """A vector over nodes ``(rows, width)``: ``node (rows,)``, ``features (width, VECTOR_FEATURES)``, and its role."""

    vector: Vector
    node: Tensor
    features: Tensor
    role: str


@dataclass(frozen=True, eq=False)
class Structure:
    """Nodes ``0 … num_nodes - 1`` in cells ``0 … num_cells - 1``, and what lies between them.

    ``nodes (num_nodes, NODE_FEATURES)``: movable or not, input or output, activations, and for what is pinned
    which one it is. ``cell (num_nodes,)``; ``activation (num_nodes,)``: number in ``ACTIVATIONS`` of the function
    that is applied to a node, -1 for none, and ``frequency (num_nodes,)`` that of a sine. Vectors are in the order of
    their use. ``marks (num_cells, 2)``: input, output. ``links (2, n)``: nodes
    that are part of others, from the part to the whole. Tensors of integers (counters, indices) and scalars of no
    node are no part of it.
    """

    num_nodes: int
    nodes: Tensor
    cell: Tensor
    activation: Tensor
    frequency: Tensor
    marks: Tensor
    cells: tuple[Cell, ...]
    blocks: tuple[BlockPart, ...]
    vectors: tuple[VectorPart, ...]
    links: Tensor

    @property
    def num_cells(self) -> int:
        return len(self.cells)


def structure_of(graph: ParameterGraph) -> Structure:
    """The structure of a parameter graph, made once for a wiring, or for all that share one program.

    Raises ``MetanetError`` for a graph without a wiring (one read back from another library's format) or
    without a tensor that a metanet could read.
    """
    wiring = graph.wiring
    if wiring is None:
        raise MetanetError(
            "this graph has no wiring (it was read back from another format), so roles and activations are unknown; "
            "make it with ws.graph(checkpoint)"
        )
    key = f"metanets {tuple(graph.shapes)} {tuple(graph.dtypes.values())}"
    known = wiring.shared.get(key)
    if isinstance(known, Structure):
        return known
    wiring.shared[key] = found = _build(graph, wiring)
    return found


def _build(graph: ParameterGraph, wiring: Wiring) -> Structure:
    usable = {n for n, d in graph.dtypes.items() if d.is_floating_point or d.is_complex}
    cells = tuple(graph.cells.values())
    order = [n for n in wiring.roles if n in graph.shapes]
    depth = {n: i / max(len(order) - 1, 1) for i, n in enumerate(order)}
    blocks = tuple(_block(graph, wiring, b, depth) for b in graph.blocks if b.tensor in usable and b.numel)
    used = [v for v in graph.vectors if v.tensor in usable and v.numel]
    used.sort(key=lambda v: depth.get(v.tensor, 0.5))
    vectors = tuple(_vector(graph, wiring, v, depth) for v in used)
    if not blocks and not vectors:
        raise MetanetError(f"no weights to read: none of the {len(graph.shapes)} tensors lies on an axis")
    links = [torch.empty(2, 0, dtype=torch.long)]
    for link in graph.links:
        inner, outer = graph.cells[link.src], graph.cells[link.dst]
        links.append(torch.stack((contained(inner, outer) + inner.start, outer.start + torch.arange(outer.size))))
    sizes = torch.tensor([c.size for c in cells])
    return Structure(
        num_nodes=graph.num_nodes,
        nodes=torch.cat([_node_features(c, wiring) for c in cells]),
        cell=torch.arange(len(cells)).repeat_interleave(sizes),
        activation=torch.tensor([_activation(c, wiring) for c in cells]).repeat_interleave(sizes),
        frequency=torch.tensor([_frequency(c, wiring) for c in cells]).repeat_interleave(sizes),
        marks=torch.tensor([[c.mark == "input", c.mark == "output"] for c in cells], dtype=torch.float32),
        cells=cells,
        blocks=blocks,
        vectors=vectors,
        links=torch.cat(links, dim=1),
    )


def _node_features(cell: Cell, wiring: Wiring) -> Tensor:
    seen = {a for f in cell.factors for a in wiring.activations.get(f, ())}
    kinds = [float(a in seen) for a in ACTIVATIONS[:-1]] + [float(bool(seen - set(ACTIVATIONS)))]
    own = torch.tensor([float(cell.movable), float(cell.mark == "input"), float(cell.mark == "output"), *kinds])
    places = cell.positions()
    kept = [i for i, f in enumerate(cell.factors) if _pinned(f, wiring)]
    columns = [(places[:, i], cell.sizes[i]) for i in kept]
    while len(columns) > _GRID:
        (a, n), (b, m) = columns[:2]
        columns[:2] = [(a * m + b, n * m)]
    index = torch.zeros(cell.size, _GRID, INDEX_FEATURES)
    for k, (at, n) in enumerate(columns):
        index[:, k] = _index_features(at, n)
    return torch.cat((own.expand(cell.size, -1), index.flatten(1)), dim=1)


def _activation(cell: Cell, wiring: Wiring) -> int:
    """The pointwise function that comes first in ``ACTIVATIONS`` of those that a cell goes through; -1: none."""
    seen = {a for f in cell.factors for a in wiring.activations.get(f, ())}
    return next((k for k, a in enumerate(POINTWISE) if a in seen), -1)


def _frequency(cell: Cell, wiring: Wiring) -> float:
    return next((wiring.frequencies[f] for f in cell.factors if f in wiring.frequencies), 1.0)


def _index_features(at: Tensor, size: int) -> Tensor:
    """Which of ``size`` pinned places: where it lies, and waves of several periods. ``(n, INDEX_FEATURES)``."""
    x = at.to(torch.float32)
    waves = x.unsqueeze(1) * torch.tensor([2 * math.pi / p for p in _PERIODS])
    share = (x / max(size - 1, 1)).unsqueeze(1)
    return torch.cat((torch.ones_like(share), 2 * share - 1, waves.sin(), waves.cos()), dim=1)


def _pinned(factor: str, wiring: Wiring) -> bool:
    return factor not in wiring.factors or wiring.factors[factor].pinned


def _depth_features(depth: float) -> Tensor:
    waves = [math.pi * f * depth for f in _DEPTHS]
    return torch.tensor([2 * depth - 1, *map(math.sin, waves), *map(math.cos, waves)])


def _role_features(wiring: Wiring, name: str) -> Tensor:
    role = wiring.roles.get(name, "other")
    return torch.tensor([float(role == r) for r in ROLES])


def _block(graph: ParameterGraph, wiring: Wiring, block: Block, depth: dict[str, float]) -> BlockPart:
    dst = block.index() + graph.cells[block.dst].start
    src = block.source_index() + graph.cells[block.src].start
    coordinates, key = _coordinates(wiring, block)
    features = torch.cat((_depth_features(depth.get(block.tensor, 0.5)), _role_features(wiring, block.tensor)))
    shape = (block.shared, dst.shape[1], src.shape[1], block.width)
    lookup = wiring.roles.get(block.tensor) == "lookup"
    order = list(graph.cells)
    ends = order.index(block.dst), order.index(block.src)
    return BlockPart(block, shape, dst, src, coordinates, features, key, lookup, ends)


def _vector(graph: ParameterGraph, wiring: Wiring, vector: Vector, depth: dict[str, float]) -> VectorPart:
    coordinates, _ = _coordinates(wiring, vector)
    own = torch.cat((_depth_features(depth.get(vector.tensor, 0.5)), _role_features(wiring, vector.tensor)))
    features = torch.cat((own.expand(vector.width, -1), coordinates), dim=1)
    role = wiring.roles.get(vector.tensor, "other")
    return VectorPart(vector, vector.index() + graph.cells[vector.dst].start, features, role)


def _coordinates(wiring: Wiring, part: Vector) -> tuple[Tensor, tuple[object, ...]]:
    """Where each feature of a block or vector lies in its kernel, ``(width, COORDINATES)``.

    Offsets count from the middle, so that kernels of different sizes share what they have in common. A feature
    that may be permuted has no place: all its positions are alike.
    """
    segments = _segments(wiring, part)
    places = [(d, f) for d, s in enumerate(segments) for f in s.factors]
    # Complex numbers have a loop more than the wiring: their real and imaginary parts.
    factors = [f for _, f in places] + [None] * (len(part.loops) - len(places))
    loops = [(x, f) for x, f in zip(part.loops, factors, strict=True) if x.feature]
    loops.sort(key=lambda pair: -pair[0].feature)
    sizes = [x.size for x, _ in loops]
    fixed = [f is None or _pinned(f, wiring) for _, f in loops]
    width = math.prod(sizes)
    grid = torch.cartesian_prod(*(torch.arange(n) for n in sizes)).reshape(width, -1) if sizes else torch.zeros(1, 0)
    columns = [(grid[:, k].float(), n) for k, n in enumerate(sizes) if fixed[k]]
    while len(columns) > _GRID:
        (a, n), (b, m) = columns[:2]
        columns[:2] = [(a * m + b, n * m)]
    out = torch.zeros(width, _GRID, 2 * len(_OFFSETS) + 1)
    for k, (at, n) in enumerate(reversed(columns)):
        offset = at - (n - 1) / 2
        waves = offset.unsqueeze(1) * torch.tensor([math.pi / (2 * f) for f in _OFFSETS])
        out[:, k] = torch.cat((torch.asinh(offset).unsqueeze(1), waves.sin(), 1 - waves.cos()), dim=1)
    key = (tuple(sizes), tuple(fixed))
    return torch.cat((torch.ones(width, 1), out.flatten(1)), dim=1), key


def _segments(wiring: Wiring, part: Vector) -> Sequence[Segment]:
    """The segments of the wiring, one per dim, that a part of a tensor was laid out from."""
    layout = wiring.layouts[part.tensor]
    combination = list(product(*(group.blocks for group in layout)))[part.part]
    row: dict[int, Segment] = {}
    for group, block in zip(layout, combination, strict=True):
        row.update(zip(group.dims, block, strict=True))
    return [row[d] for d in range(len(wiring.shapes[part.tensor]))]

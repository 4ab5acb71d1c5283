"""Networks for the operator metanet: one prepared, and many of them in one batch.

Blocks of equal shape are stacked, whichever network they come from: a population of one architecture becomes
a few large batched matrix products, and so do the layers of one transformer. Shapes that differ, those of kernels
too, are padded up to a common size with weights of zero, which send nothing, where that costs less than a stack more.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from weightspace.errors import MetanetError
from weightspace.graph import ParameterGraph
from weightspace.graph.layout import Block
from weightspace.metanets.structure import BLOCK_FEATURES, BlockPart, Structure

# Below this many weights a block is stacked with others; above, it is read in chunks of about this many.
CHUNK = 4 << 20
# What a stack of blocks costs beside its weights, in weights whose products take as long: found with training steps of
# 32 networks of the wild park at d = 64 (0.69 s in 61 stacks; 0.47 to 0.51 s at 10,000 to 40,000, in 22 to 12).
STACK = 20_000
# Stacks among which partners are looked for, and kernel positions up to which they are.
_STACKS, _POSITIONS = 400, 256
_WAVES = (0.5, 1.0, 2.0, 4.0, 8.0)
SHAPE_FEATURES = 2 * len(_WAVES) + 3


@dataclass(frozen=True, eq=False)
class Item:
    """A prepared network: its structure and its weights, of ``models`` networks on one wiring.

    ``weights``: per block ``(models, shared, out, in, positions)``, or None where it is read when it is needed.
    ``scales``: per block ``(models, 2)``, mean |w| and mean w². ``shapes``: per block ``(models, SHAPE_FEATURES)``,
    see ``shape_features``. ``values (models, rows)``: all vector elements. ``affine (nodes, 2)``: what the vectors
    of the base do to a value that passes a node, one after the other, as a factor and a shift.
    """

    structure: Structure
    weights: tuple[Tensor | None, ...]
    scales: Tensor
    shapes: Tensor
    values: Tensor
    affine: Tensor
    graphs: tuple[ParameterGraph, ...]


@dataclass(frozen=True, eq=False)
class Bucket:
    """Blocks of one (padded) shape, a matrix of a stack each: B of them.

    ``weight (B, models, out, in, positions)``; ``dst (B, out)``, ``src (B, in)`` node numbers in the batch;
    ``coordinates (positions, ·)``; ``features (B, ·)``; ``scales (B, models, 2)``; ``fans (B, 4)``: out, in and
    positions before padding, and 1 for a table of lookups. Instead of ``weight`` a block that is read in chunks has
    ``rows``: from the number of a matrix and a range of its rows to their weights ``(models, rows, in, positions)``.
    """

    weight: Tensor | None
    dst: Tensor
    src: Tensor
    coordinates: Tensor
    features: Tensor
    scales: Tensor
    fans: Tensor
    rows: Callable[[int, int, int], Tensor] | None = None

    def to(self, device: torch.device | str) -> Bucket:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class Batch:
    """``size`` networks as one graph: nodes and cells numbered through, blocks in buckets.

    ``nodes (N, NODE_FEATURES)``, ``activation (N,)``, ``frequency (N,)``, ``affine (N, 2)``, ``cell (N,)``,
    ``cell_network (cells,)``, ``marks (cells, 2)``, ``links (2, L)``, vector elements ``values (T, models)`` with
    ``value_node (T,)`` and ``value_features (T, VECTOR_FEATURES)``.
    Of every block ``block_features (K, BLOCK_FEATURES)``, ``block_scales (K, models, 2)``, ``block_shapes (K,
    models, SHAPE_FEATURES)``, ``block_fans (K, 3)`` (out, in, positions), ``block_network (K,)`` and
    ``block_cells (K, 2)``, the cells that it leads to and comes from.
    ``starts``: first node of every network.
    """

    size: int
    models: int
    nodes: Tensor
    activation: Tensor
    frequency: Tensor
    affine: Tensor
    cell: Tensor
    cell_network: Tensor
    marks: Tensor
    links: Tensor
    values: Tensor
    value_node: Tensor
    value_features: Tensor
    block_features: Tensor
    block_scales: Tensor
    block_shapes: Tensor
    block_fans: Tensor
    block_network: Tensor
    block_cells: Tensor
    buckets: tuple[Bucket, ...]
    starts: tuple[int, ...]
    items: tuple[Item, ...]

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved, buckets=tuple(b.to(device) for b in self.buckets))


def prepare(graphs: Sequence[ParameterGraph], structure: Structure, lazy: bool | None = None) -> Item:
    """The weights of networks on one wiring, ready for a batch; the first is the base, the others are differences.

    ``lazy`` leaves the blocks in their file and reads them in every round, a chunk at a time; by default that
    is done for blocks above ``CHUNK`` weights. Raises ``MetanetError`` for weights that are not finite, or for
    networks of different shapes.
    """
    base = graphs[0]
    for other in graphs[1:]:
        if other.shapes != base.shapes:
            raise MetanetError("networks on one wiring need the same tensors; align and match them first")
    weights: list[Tensor | None] = []
    scales, shapes = [], []
    for part in structure.blocks:
        far = part.block.numel > CHUNK if lazy is None else lazy
        weight = None if far else _differences([_float(g.weight(part.block)) for g in graphs])
        weights.append(weight)
        scale, shape = _summary(graphs, part.block, weight)
        scales.append(scale)
        shapes.append(shape)
    rows = [_differences([_float(g.weight(v.vector)).flatten() for g in graphs]) for v in structure.vectors]
    stacked = torch.stack(scales) if scales else torch.empty(0, len(graphs), 2, dtype=torch.float64)
    held = torch.cat([torch.empty(len(graphs), 0), *rows], dim=1)
    if not bool(torch.isfinite(stacked).all()) or not bool(torch.isfinite(held).all()):
        raise MetanetError("this network has weights that are infinite or not a number (a diverged training?)")
    formed = torch.stack(shapes) if shapes else torch.empty(0, len(graphs), SHAPE_FEATURES, dtype=torch.float64)
    return Item(structure, tuple(weights), stacked, formed, held, affine_of(structure, held[0]), tuple(graphs))


def collate(items: Sequence[Item]) -> Batch:
    """One batch of prepared networks; raises ``MetanetError`` where there are none."""
    if not items:
        raise MetanetError("an empty batch: give at least one network")
    models = items[0].values.shape[0]
    if any(i.values.shape[0] != models for i in items):
        raise MetanetError("all networks of a batch need the same number of models on their wiring")
    plan = _plan(tuple(i.structure for i in items))
    buckets = []
    for group in plan.groups:
        scales = torch.stack([items[n].scales[b] for n, b in group.members]).repeat_interleave(group.shared, 0)
        weight = None if group.far else _stack(items, group)
        rows = _reader(items, group) if group.far else None
        buckets.append(
            Bucket(weight, group.dst, group.src, group.coordinates, group.features, scales, group.fans, rows)
        )
    values = torch.cat([i.values for i in items], dim=1).T.contiguous()
    return Batch(
        len(items), models, plan.nodes, plan.activation, plan.frequency, torch.cat([i.affine for i in items]),
        plan.cell, plan.cell_network, plan.marks, plan.links, values, plan.value_node,
        plan.value_features, plan.block_features, torch.cat([i.scales for i in items]),
        torch.cat([i.shapes for i in items]), plan.block_fans, plan.block_network, plan.block_cells, tuple(buckets),
        plan.starts, tuple(items),
    )  # fmt: skip


# -------------------------------------------------------------------- what depends on structures alone


@dataclass(frozen=True, eq=False)
class _Group:
    """Blocks (item, number of the block) that share a bucket; ``shared`` matrices of each member.

    ``places``: of each member, which of the bucket's positions are its own; None for all of them, in order.
    """

    members: tuple[tuple[int, int], ...]
    shared: Tensor
    shape: tuple[int, int, int]
    dst: Tensor
    src: Tensor
    coordinates: Tensor
    features: Tensor
    fans: Tensor
    far: bool
    places: tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class _Plan:
    nodes: Tensor
    activation: Tensor
    frequency: Tensor
    cell: Tensor
    cell_network: Tensor
    marks: Tensor
    links: Tensor
    value_node: Tensor
    value_features: Tensor
    block_features: Tensor
    block_fans: Tensor
    block_network: Tensor
    block_cells: Tensor
    groups: tuple[_Group, ...]
    starts: tuple[int, ...]


_PLANS: OrderedDict[tuple[Structure, ...], _Plan] = OrderedDict()
_KEPT = 8


def _plan(structures: tuple[Structure, ...]) -> _Plan:
    """Batches of one population share all their indices; the last few plans are kept."""
    found = _PLANS.pop(structures, None) or _make_plan(structures)
    _PLANS[structures] = found
    while len(_PLANS) > _KEPT:
        _PLANS.popitem(last=False)
    return found


def _make_plan(structures: tuple[Structure, ...]) -> _Plan:
    starts, first_cells = [0], [0]
    for s in structures:
        starts.append(starts[-1] + s.num_nodes)
        first_cells.append(first_cells[-1] + s.num_cells)
    where: dict[tuple[object, ...], list[tuple[int, int]]] = {}
    for n, s in enumerate(structures):
        for b, part in enumerate(s.blocks):
            far = part.block.numel > CHUNK
            # A large block is a bucket of its own.
            key = ("far", n, b) if far else (*map(_padded, part.shape[1:3]), part.shape[3], part.key)
            where.setdefault(key, []).append((n, b))
    near = [members for key, members in where.items() if key[0] != "far"]
    groups = tuple(
        [_group(structures, members, starts, False) for members in _merged(structures, near)]
        + [_group(structures, members, starts, True) for key, members in where.items() if key[0] == "far"]
    )
    nodes = []
    for s, start in zip(structures, starts, strict=False):
        nodes += [v.node.repeat_interleave(v.vector.width) + start for v in s.vectors]
    features = [v.features.repeat(len(v.node), 1) for s in structures for v in s.vectors]
    empty = torch.empty(0, dtype=torch.long)
    blocks = [(n, part) for n, s in enumerate(structures) for part in s.blocks]
    return _Plan(
        nodes=torch.cat([s.nodes for s in structures]),
        activation=torch.cat([s.activation for s in structures]),
        frequency=torch.cat([s.frequency for s in structures]),
        cell=torch.cat([s.cell + c for s, c in zip(structures, first_cells, strict=False)]),
        cell_network=torch.arange(len(structures)).repeat_interleave(torch.tensor([s.num_cells for s in structures])),
        marks=torch.cat([s.marks for s in structures]),
        links=torch.cat([s.links + start for s, start in zip(structures, starts, strict=False)], dim=1),
        value_node=torch.cat([empty, *nodes]),
        value_features=torch.cat(features) if features else torch.empty(0, 0),
        block_features=torch.stack([p.features for _, p in blocks]) if blocks else torch.empty(0, BLOCK_FEATURES),
        block_fans=torch.tensor([[p.shape[1], p.shape[2], p.shape[3]] for _, p in blocks]).reshape(-1, 3),
        block_network=torch.tensor([n for n, _ in blocks], dtype=torch.long),
        block_cells=torch.tensor([[first_cells[n] + c for c in p.cells] for n, p in blocks]).reshape(-1, 2),
        groups=groups,
        starts=tuple(starts),
    )


def _group(
    structures: Sequence[Structure], members: list[tuple[int, int]], starts: Sequence[int], far: bool
) -> _Group:
    parts: list[BlockPart] = [structures[n].blocks[b] for n, b in members]
    out, inner = (max(p.shape[k] for p in parts) for k in (1, 2))
    if not far:
        out, inner = _padded(out), _padded(inner)
    order: dict[Position, int] = {}
    rows: list[Tensor] = []
    for p in {p.key: p for p in parts}.values():
        for row, position in zip(p.coordinates, _positions(p), strict=True):
            if order.setdefault(position, len(order)) == len(rows):
                rows.append(row)
    own = {p.key: torch.tensor([order[position] for position in _positions(p)]) for p in parts}
    every = torch.arange(len(order))
    shared = torch.tensor([p.shape[0] for p in parts])
    total = int(shared.sum())
    # Padding points at the first node, which gets nothing from weights of zero.
    dst, src = torch.zeros(total, out, dtype=torch.long), torch.zeros(total, inner, dtype=torch.long)
    at = 0
    for (n, _), p in zip(members, parts, strict=True):
        end = at + p.shape[0]
        dst[at:end, : p.shape[1]] = p.dst + starts[n]
        src[at:end, : p.shape[2]] = p.src + starts[n]
        at = end
    fans = torch.tensor([[*p.shape[1:], float(p.lookup)] for p in parts], dtype=torch.float32)
    features = torch.stack([p.features for p in parts])
    return _Group(
        tuple(members), shared, (out, inner, len(order)), dst, src, torch.stack(rows),
        features.repeat_interleave(shared, 0), fans.repeat_interleave(shared, 0), far,
        tuple(None if torch.equal(own[p.key], every) else own[p.key] for p in parts),
    )  # fmt: skip


Position = tuple[tuple[float, ...], int]
_KNOWN: dict[tuple[object, ...], tuple[Position, ...]] = {}


def _positions(part: BlockPart) -> tuple[Position, ...]:
    """What tells positions of kernels apart: their coordinates, and which of several with these."""
    if part.key not in _KNOWN:
        seen: Counter[tuple[float, ...]] = Counter()
        found = []
        for row in map(tuple, part.coordinates.tolist()):
            found.append((row, seen[row]))
            seen[row] += 1
        _KNOWN[part.key] = tuple(found)
    return _KNOWN[part.key]


@dataclass(frozen=True)
class _Stacked:
    """What the costs of a stack follow from: matrices, their padded sizes, their positions, and the stack's numbers."""

    count: int
    out: int
    inner: int
    positions: frozenset[Position] | tuple[object, ...]
    width: int
    members: tuple[int, ...]

    @property
    def work(self) -> int:
        return self.count * self.out * self.inner * self.width

    def __add__(self, other: _Stacked) -> _Stacked:
        positions, width = self.positions, self.width
        if positions != other.positions:
            assert isinstance(positions, frozenset)
            assert isinstance(other.positions, frozenset)
            positions = positions | other.positions
            width = len(positions)
        return _Stacked(
            self.count + other.count, max(self.out, other.out), max(self.inner, other.inner), positions, width,
            self.members + other.members,
        )  # fmt: skip

    def saved(self, other: _Stacked) -> int:
        """Weights' worth of time that one stack of both saves."""
        small = isinstance(self.positions, frozenset) and isinstance(other.positions, frozenset)
        if not small and self.positions != other.positions:
            return -1
        return STACK + self.work + other.work - (self + other).work


def _merged(structures: Sequence[Structure], near: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    """Stacks joined two by two, those first that save most, until none is worth its padding."""
    if not 1 < len(near) <= _STACKS:
        return near
    stacks: list[_Stacked] = []
    for number, members in enumerate(near):
        parts = [structures[n].blocks[b] for n, b in members]
        _, out, inner, width = parts[0].shape
        positions = frozenset(_positions(parts[0])) if width <= _POSITIONS else parts[0].key
        count = sum(p.shape[0] for p in parts)
        stacks.append(_Stacked(count, _padded(out), _padded(inner), positions, width, (number,)))
    alive = dict(enumerate(stacks))
    heap = [(-a.saved(b), i, j) for (i, a), (j, b) in combinations(alive.items(), 2)]
    heap = [entry for entry in heap if entry[0] < 0]
    heapify(heap)
    while heap:
        _, i, j = heappop(heap)
        if i not in alive or j not in alive:
            continue
        joined, number = alive.pop(i) + alive.pop(j), len(stacks)
        for k, other in alive.items():
            if (saved := joined.saved(other)) > 0:
                heappush(heap, (-saved, k, number))
        stacks.append(joined)
        alive[number] = joined
    return [[member for number in sorted(stack.members) for member in near[number]] for stack in alive.values()]


def _padded(n: int) -> int:
    """Sizes that blocks are padded to: 1, 2, 3, 4, 6, 8, 12, 16, 24, … at most half again as much work."""
    power = 1
    while power < n:
        if power >= 2 and power + power // 2 >= n:
            return power + power // 2
        power *= 2
    return power


# -------------------------------------------------------------------- weights


def _stack(items: Sequence[Item], group: _Group) -> Tensor:
    out, inner, positions = group.shape
    parts = [_held(items[n], b).transpose(0, 1) for n, b in group.members]
    if all(p.shape[2:4] == (out, inner) for p in parts) and all(places is None for places in group.places):
        return torch.cat(parts)
    models = parts[0].shape[1]
    weight = parts[0].new_zeros(int(group.shared.sum()), models, out, inner, positions)
    at = 0
    for p, places in zip(parts, group.places, strict=True):
        room = weight[at : at + len(p), :, : p.shape[2], : p.shape[3]]
        if places is None:
            room.copy_(p)
        else:
            room[..., places] = p
        at += len(p)
    return weight


def _held(item: Item, block: int) -> Tensor:
    held = item.weights[block]
    if held is not None:
        return held
    return _differences([_float(g.weight(item.structure.blocks[block].block)) for g in item.graphs])


def _reader(items: Sequence[Item], group: _Group) -> Callable[[int, int, int], Tensor]:
    ((n, b),) = group.members
    item = items[n]
    block = item.structure.blocks[b].block
    held = item.weights[b]

    def rows(matrix: int, start: int, stop: int) -> Tensor:
        if held is not None:
            return held[:, matrix, start:stop]
        return _differences([_float(g.weight(block)[matrix, start:stop]) for g in item.graphs])

    return rows


def _float(x: Tensor) -> Tensor:
    return x.to(torch.float64) if x.dtype == torch.float64 else x.to(torch.float32)


def _differences(found: list[Tensor]) -> Tensor:
    """The base and the differences of the others from it, stacked."""
    return torch.stack([found[0], *(x - found[0] for x in found[1:])])


def affine_of(structure: Structure, values: Tensor) -> Tensor:
    """Factor and shift per node, ``(nodes, 2)``: vectors composed in the order of their use, as far as roles say how.

    ``values (rows,)``: the elements of the vectors of a structure, end to end.

    Exact for a bias and for a batch norm in evaluation but for its epsilon; where many layers share their neurons
    it is only an order of magnitude, which is bounded.
    """
    out = torch.zeros(structure.num_nodes, 2, dtype=values.dtype)
    out[:, 0] = 1
    at = 0
    for part in structure.vectors:
        width = part.vector.width
        count = len(part.node) * width
        v = values[at : at + count].view(-1, width)
        at += count
        # A depthwise kernel multiplies a constant map by the sum of its entries.
        v = v.sum(1) if part.role == "weight" else v.mean(1)
        rows = out[part.node]
        if part.role in ("shift", "mean"):
            rows[:, 1] += v if part.role == "shift" else -v
        elif part.role in ("gain", "weight"):
            rows = rows * v.unsqueeze(1)
        elif part.role == "variance":
            rows = rows / (v.clamp_min(0) + 1e-5).sqrt().unsqueeze(1)
        out[part.node] = rows.clamp(-100, 100)
    return out


def _summary(graphs: Sequence[ParameterGraph], block: Block, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale ``(models, 2)`` and shape ``(models, SHAPE_FEATURES)`` of the weights of a block, in float64."""

    def chunks() -> Iterator[Tensor]:
        if weight is not None:
            yield weight.flatten(1).to(torch.float64)
            return
        matrices = [g.weight(block) for g in graphs]
        shared, rows, *rest = matrices[0].shape
        step = max(1, CHUNK // max(rest[0] * rest[1], 1))
        for k in range(shared):
            for start in range(0, rows, step):
                yield _differences([_float(m[k, start : start + step]) for m in matrices]).flatten(1)

    scale = torch.zeros(len(graphs), 2, dtype=torch.float64)
    for x in chunks():
        scale += torch.stack((x.abs(), x.square())).sum(2, dtype=torch.float64).T / block.numel
    rms = scale[:, 1:].clamp_min(1e-30).sqrt()
    shape = torch.zeros(len(graphs), SHAPE_FEATURES, dtype=torch.float64)
    for x in chunks():
        shape += shape_features(x / rms.to(x.dtype)) / block.numel
    return scale, shape


def shape_features(x: Tensor) -> Tensor:
    """Sums over ``x (models, n)`` that say how weights of mean square 1 are distributed: ``(models, SHAPE_FEATURES)``.

    The mean, the mean size, how many are next to nothing, and the characteristic function at a few frequencies.
    Smooth in the weights, and sums, so that a stream of chunks gives them too.
    """
    parts = [x.sum(1), x.abs().sum(1), torch.exp(-100 * x.square()).sum(1)]
    for wave in _WAVES:
        parts += [(wave * x).sin().sum(1), (wave * x).cos().sum(1)]
    return torch.stack(parts, dim=1).to(torch.float64)

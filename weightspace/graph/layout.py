"""Which nodes a parameter graph has, and how each tensor's elements lie between them.

A **cell** is a group of nodes: the elements of one or several factors of the wiring together (neurons; heads
and the channels inside them). A part of a tensor is a loop nest over factors: element
``origin + Σ stride_i x_i`` of the tensor lies between node ``Σ dst_i x_i`` of one cell and node ``Σ src_i x_i``
of another, at position ``Σ feature_i x_i`` of its features. Everything else is read off these loops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import torch

from weightspace.errors import GraphError
from weightspace.wiring.axis import Factor, Segment
from weightspace.wiring.wiring import Layout, Wiring

# Pinned factors that are places on a grid rather than neurons: features of an edge, not nodes.
POSITIONS = frozenset(
    ("kernel positions", "spatial positions", "window positions", "padded positions", "real and imaginary")
)
_INPUTS = frozenset(("input", "vocabulary"))


@dataclass(frozen=True)
class Cell:
    """A group of nodes: the elements of ``factors`` together, row-major, numbered from ``start``.

    ``movable`` tells whether any of the factors may be permuted; ``mark`` is ``"input"`` or ``"output"`` where
    the wiring says that the nodes are the network's own inputs (a vocabulary too) or outputs, else ``""``.
    """

    name: str
    factors: tuple[str, ...]
    sizes: tuple[int, ...]
    start: int
    movable: bool
    mark: str = ""

    @property
    def size(self) -> int:
        return prod(self.sizes)

    @property
    def steps(self) -> tuple[int, ...]:
        """How far apart two nodes are that differ by one in each factor."""
        return _steps(self.sizes)

    def positions(self) -> torch.Tensor:
        """Position of every node in each factor, shape ``(size, len(factors))``, int64."""
        if not self.sizes:
            return torch.zeros(1, 0, dtype=torch.long)
        return torch.cartesian_prod(*(torch.arange(n) for n in self.sizes)).reshape(self.size, -1)

    def __repr__(self) -> str:
        kind = ", ".join(x for x in ("movable" if self.movable else "pinned", self.mark) if x)
        return f"{self.name}:{'×'.join(map(str, self.sizes)) or 1} ({kind})"


@dataclass(frozen=True)
class Loop:
    """One index of a part of a tensor: its size, its dim and stride there, and its step in the two cells.

    ``dst``, ``src`` and ``feature`` are 0 where the index does not move along them.
    """

    size: int
    dim: int
    stride: int
    dst: int = 0
    src: int = 0
    feature: int = 0


@dataclass(frozen=True)
class Vector:
    """A tensor (or one part of it) over one cell: a bias, a norm, running statistics, a depthwise kernel.

    Per node it has ``width`` features. ``tensor`` names the tensor, ``part`` of ``parts`` which segment of it.
    """

    tensor: str
    part: int
    parts: int
    dst: str
    origin: tuple[int, ...]
    loops: tuple[Loop, ...]

    @property
    def label(self) -> str:
        return self.tensor if self.parts == 1 else f"{self.tensor}#{self.part}"

    @property
    def numel(self) -> int:
        return prod(loop.size for loop in self.loops)

    @property
    def width(self) -> int:
        """Number of features: kernel, window or spatial positions."""
        return prod(loop.size for loop in self.loops if loop.feature)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(loop.size for loop in self.loops)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of the tensor with one dim per loop, in the tensor's own order; never a copy."""
        strides = tensor.stride()
        start = tensor.storage_offset() + sum(o * s for o, s in zip(self.origin, strides, strict=True))
        return tensor.as_strided(self.sizes, [loop.stride * strides[loop.dim] for loop in self.loops], start)

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part as ``(nodes, width)``; a view wherever the strides can be merged."""
        return self._grouped(tensor, (self._ends("dst"), self._features()))

    def index(self) -> torch.Tensor:
        """Number in the cell of each row of ``matrix``, shape ``(nodes,)``."""
        return spread([self.loops[i] for i in self._ends("dst")], "dst").reshape(-1)

    def _ends(self, end: str) -> list[int]:
        chosen = [i for i, x in enumerate(self.loops) if (x.src if end == "src" else x.dst) and not (x.dst and x.src)]
        return sorted(chosen, key=lambda i: -(self.loops[i].dst or self.loops[i].src))

    def _features(self) -> list[int]:
        chosen = [i for i, x in enumerate(self.loops) if x.feature]
        return sorted(chosen, key=lambda i: -self.loops[i].feature)

    def _grouped(self, tensor: torch.Tensor, groups: Sequence[Sequence[int]]) -> torch.Tensor:
        view = self.view(tensor).permute([i for g in groups for i in g])
        return view.reshape([prod(self.loops[i].size for i in g) for g in groups])


@dataclass(frozen=True)
class Block(Vector):
    """A dense bundle of edges: a tensor (or one part of it) from cell ``src`` to cell ``dst``.

    Grouped convolutions, heads and stacked experts are one block: indices that both cells have in common
    (``shared``) make it block-diagonal.
    """

    src: str = ""

    @property
    def shared(self) -> int:
        return prod(loop.size for loop in self.loops if loop.dst and loop.src)

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """The weights as ``(shared, out, in, width)``; a view wherever the strides can be merged."""
        return self._grouped(tensor, (self._both(), self._ends("dst"), self._ends("src"), self._features()))

    def index(self) -> torch.Tensor:
        """Number in cell ``dst`` of each row of ``matrix``, shape ``(shared, out)``."""
        both, ends = self._both(), self._ends("dst")
        found = spread([self.loops[i] for i in [*both, *ends]], "dst")
        return found.reshape(self.shared, prod(self.loops[i].size for i in ends))

    def source_index(self) -> torch.Tensor:
        """Number in cell ``src`` of each column of ``matrix``, shape ``(shared, in)``."""
        both, ends = self._both(), self._ends("src")
        found = spread([self.loops[i] for i in [*both, *ends]], "src")
        return found.reshape(self.shared, prod(self.loops[i].size for i in ends))

    def _both(self) -> list[int]:
        chosen = [i for i, x in enumerate(self.loops) if x.dst and x.src]
        return sorted(chosen, key=lambda i: -self.loops[i].dst)


@dataclass(frozen=True)
class Link:
    """Edges without parameters, from each node of a cell to the nodes of a larger cell that it is part of."""

    src: str
    dst: str


@dataclass(frozen=True)
class Structure:
    """Cells, blocks, vectors, values (names of tensors with no nodes) and links of a network."""

    cells: dict[str, Cell]
    blocks: tuple[Block, ...]
    vectors: tuple[Vector, ...]
    values: tuple[str, ...]
    links: tuple[Link, ...]


def structure(wiring: Wiring, names: Sequence[str], complex_names: frozenset[str] = frozenset()) -> Structure:
    """The nodes that a wiring describes and how the named tensors lie between them.

    Tensors in ``complex_names`` are read as real ones with a last dim of 2.
    """
    builder = _Builder(wiring.factors, wiring.shapes)
    blocks: list[Block] = []
    vectors: list[Vector] = []
    values: list[str] = []
    for name in names:
        shape = wiring.shapes[name]
        parts = builder.parts(name, shape, wiring.layouts[name], wiring.reads.get(name))
        if name in complex_names:
            parts = [_with_complex(p, len(shape)) for p in parts]
        covered = sum(p.numel for p in parts)
        if covered != prod(shape) * (2 if name in complex_names else 1):
            raise GraphError(
                f"the wiring of {name!r} describes {covered:,} elements of a tensor of shape {shape}; "
                "it is damaged: make it again with ws.wiring"
            )
        if any(not p.dst for p in parts):
            values.append(name)
        else:
            blocks += [p for p in parts if isinstance(p, Block)]
            vectors += [p for p in parts if not isinstance(p, Block)]
    links = builder.links()
    return Structure(builder.numbered(), tuple(blocks), tuple(vectors), tuple(values), links)


def spread(loops: Sequence[Loop], step: str, base: int = 0) -> torch.Tensor:
    """``base + Σ step_i x_i`` over a loop nest: one dim per loop, of size 1 where the step is 0. int64."""
    out = torch.full((1,) * len(loops), base, dtype=torch.long)
    for i, loop in enumerate(loops):
        s = getattr(loop, step)
        if s:
            shape = [1] * len(loops)
            shape[i] = loop.size
            out = out + (torch.arange(loop.size) * s).reshape(shape)
    return out


def contained(inner: Cell, outer: Cell) -> torch.Tensor:
    """For every node of the outer cell, the number in the inner cell of the node that it is part of."""
    places = [outer.factors.index(f) for f in inner.factors]
    loops = [
        Loop(n, 0, 1, dst=inner.steps[places.index(i)] if i in places else 0) for i, n in enumerate(outer.sizes)
    ]
    return spread(loops, "dst").expand(outer.sizes).reshape(-1)


# -------------------------------------------------------------------- finding the parts


def _steps(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(sizes[i + 1 :]) for i in range(len(sizes)))


def _with_complex(part: Vector, dims: int) -> Vector:
    loops = tuple(replace(x, feature=x.feature * 2) for x in part.loops)
    return replace(part, origin=(*part.origin, 0), loops=(*loops, Loop(2, dims, 1, feature=1)))


class _Builder:
    """Cells found so far, by the factors that they are made of."""

    def __init__(self, factors: Mapping[str, Factor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.factors = factors
        self.shapes = shapes
        self.cells: dict[tuple[str, ...], Cell] = {}
        self.names: set[str] = set()
        self.single: dict[str, Cell] = {}

    def parts(self, name: str, shape: tuple[int, ...], layout: Layout, reads: int | None) -> list[Vector]:
        segments: list[list[Segment]] = []
        for combination in product(*(group.blocks for group in layout)):
            row: dict[int, Segment] = {}
            for group, block in zip(layout, combination, strict=True):
                row.update(zip(group.dims, block, strict=True))
            segments.append([row[d] for d in range(len(shape))])
        nodes = self._node_dims(name, shape, segments, reads)
        return [self._part(name, k, len(segments), row, nodes, reads) for k, row in enumerate(segments)]

    def _node_dims(
        self, name: str, shape: tuple[int, ...], segments: Sequence[Sequence[Segment]], reads: int | None
    ) -> list[int]:
        """Dims whose elements are nodes; the others are features."""
        used = {d: {f for row in segments for f in row[d].factors} for d in range(len(shape))}
        nodes = {d for d, fs in used.items() if any(not self._is_position(f) for f in fs)}
        filled = [d for d, fs in used.items() if fs]
        kernel = {d for d in filled if all(self.factors[f].reason == "kernel positions" for f in used[d])}
        if len(filled) in (1, 2) and not kernel:
            # A matrix over places (token mixing, learned positions): the places are what it connects.
            nodes |= set(filled)
        if reads is not None and len(shape) >= 2:
            # An axis of one element names no factor. It is a node all the same, where a product makes it or
            # sums over it; of a convolution's input it cannot be told from a depthwise kernel.
            # A transposed kernel (in, out, …) with one output looks depthwise too: only its bias tells.
            out = next(d for d in range(len(shape)) if d != reads and d not in kernel)
            plain = len(shape) == 2 or out == 0 or self.shapes.get(f"{_stem(name)}.bias") == (1,)
            if shape[out] == 1 and plain and (reads in nodes or len(shape) == 2):
                nodes.add(out)
            if len(shape) == 2 and shape[reads] == 1 and out in nodes:
                nodes.add(reads)
        if not nodes and shape == (1,) and _stem(name) in self.single:
            nodes.add(0)
        return sorted(nodes)

    def _part(
        self, name: str, part: int, parts: int, row: Sequence[Segment], nodes: Sequence[int], reads: int | None
    ) -> Vector:
        own = {d: self._own(row[d]) for d in nodes}
        outer = {d: self._outer(own[d], d, row) for d in nodes}
        # A dim that only tells the fibre of another (the expert of a stacked weight) is no end of its own.
        indices = {
            d
            for d in nodes
            if own[d] and all(any(f in outer[e] for e in nodes if e != d) for f in own[d])
        }
        ends = [d for d in nodes if d not in indices][-2:]
        dst, src = (ends[0] if ends else None), None
        if len(ends) == 2:
            dst, src = (ends[1], ends[0]) if reads == ends[0] else (ends[0], ends[1])
        # What a layer makes is called after the layer, so that its bias finds it.
        names = {d: _stem(name) + (f".{d}" if d != dst else "") for d in ends}
        cells = {d: self._cell(names[d], row[d], outer[d], own[d]) for d in ends}
        steps: dict[tuple[int, int], dict[str, int]] = {}
        for role, end in (("dst", dst), ("src", src)):
            if end is None:
                continue
            cell = cells[end]
            free = list(range(len(cell.factors)))
            for d, k, f in self._occurrences(row, end, outer[end], own[end]):
                slot = next(i for i in free if cell.factors[i] == f)
                free.remove(slot)
                steps.setdefault((d, k), {})[role] = cell.steps[slot]
        places = [(d, k) for d, s in enumerate(row) for k in range(len(s.factors))]
        features = [place for place in places if place not in steps]
        for place, step in zip(features, _steps([row[d].sizes[k] for d, k in features]), strict=True):
            steps[place] = {"feature": step}
        loops = tuple(Loop(row[d].sizes[k], d, row[d].strides[k], **steps[d, k]) for d, k in places)
        for d, k in places:
            factor = self.factors[row[d].factors[k]]
            if factor.size != row[d].sizes[k]:
                raise GraphError(
                    f"{name!r} carries {row[d].sizes[k]} of the {factor.size} elements of {factor.name}; the wiring "
                    "is damaged: make it again with ws.wiring"
                )
        origin = tuple(s.start for s in row)
        at = "" if dst is None else cells[dst].name
        if src is None:
            return Vector(name, part, parts, at, origin, loops)
        return Block(name, part, parts, at, origin, loops, src=cells[src].name)

    def _is_position(self, factor: str) -> bool:
        f = self.factors[factor]
        return f.pinned and f.reason in POSITIONS

    def _own(self, segment: Segment) -> tuple[str, ...]:
        """The factors of a segment that make nodes: all but positions, unless there is nothing else.

        Positions that a factor is fibred over belong to its nodes.
        """
        chosen = {f for f in segment.factors if not self._is_position(f)}
        chosen |= {o for f in chosen for o in self.factors[f].over}
        return tuple(f for f in segment.factors if f in chosen) or segment.factors

    def _outer(self, own: Sequence[str], dim: int, row: Sequence[Segment]) -> tuple[str, ...]:
        """What the factors are fibred over, where another dim of the tensor carries it."""
        found: list[str] = []
        for f in own:
            for o in self.factors[f].over:
                if o not in own and o not in found and any(o in s.factors for d, s in enumerate(row) if d != dim):
                    found.append(o)
        return tuple(found)

    def _occurrences(
        self, row: Sequence[Segment], end: int, outer: Sequence[str], own: Sequence[str]
    ) -> list[tuple[int, int, str]]:
        """Where the indices of an end's nodes run: in other dims for what it is fibred over, else its own."""
        found = [
            next((d, s.factors.index(f), f) for d, s in enumerate(row) if d != end and f in s.factors) for f in outer
        ]
        left = list(own)
        for k, f in enumerate(row[end].factors):
            if f in left:
                left.remove(f)
                found.append((end, k, f))
        return found

    def _cell(self, name: str, segment: Segment, outer: tuple[str, ...], own: tuple[str, ...]) -> Cell:
        if not own:
            stem = name + (f"[{segment.start}]" if segment.start else "")
            if stem not in self.single:
                cell = Cell(self._unique(stem), (), (), 0, False)
                self.single[stem] = self.cells[f"\0{stem}",] = cell
            return self.single[stem]
        return self._of((*outer, *own))

    def _of(self, factors: tuple[str, ...]) -> Cell:
        # The order of distinct factors says nothing. Of one that occurs twice only the order tells which is which.
        key = tuple(sorted(factors)) if len(set(factors)) == len(factors) else ("\0", *factors)
        if key not in self.cells:
            found = [self.factors[f] for f in factors]
            reasons = {f.reason for f in found if f.pinned}
            mark = "output" if "output" in reasons else "input" if reasons & _INPUTS else ""
            movable = any(not f.pinned for f in found)
            name = self._unique(_joined(factors))
            self.cells[key] = Cell(name, factors, tuple(f.size for f in found), 0, movable, mark)
        return self.cells[key]

    def _unique(self, name: str) -> str:
        unique, n = name, 2
        while unique in self.names:
            unique, n = f"{name}~{n}", n + 1
        self.names.add(unique)
        return unique

    def links(self) -> tuple[Link, ...]:
        """Links from each cell to the next larger ones, after adding what cells have in common as cells.

        Query and value channels that move with the same heads share no tensor: the heads join them.
        """
        sets = {key: frozenset(c.factors) for key, c in self.cells.items() if len(set(c.factors)) == len(c.factors) > 0}
        queue = list(sets)
        carriers: dict[str, list[tuple[str, ...]]] = {}
        while queue:
            key = queue.pop(0)
            near = dict.fromkeys(k for f in sets[key] for k in carriers.get(f, ()))
            for other in near:
                common = sets[key] & sets[other]
                # Fibres mean nothing without what they are fibred over.
                common = frozenset(f for f in common if set(self.factors[f].over) <= common)
                if not any(not self.factors[f].pinned for f in common):
                    continue
                joined = tuple(sorted(common))
                if joined not in sets:
                    self._of(tuple(f for f in self.cells[key].factors if f in common))
                    sets[joined] = common
                    queue.append(joined)
            for f in sets[key]:
                carriers.setdefault(f, []).append(key)
        found = []
        for key, factors in sets.items():
            inner = [k for k in dict.fromkeys(k for f in factors for k in carriers[f]) if sets[k] < factors]
            top = [k for k in inner if not any(sets[k] < sets[j] for j in inner)]
            found += [Link(self.cells[k].name, self.cells[key].name) for k in top]
        return tuple(found)

    def numbered(self) -> dict[str, Cell]:
        out, start = {}, 0
        for cell in self.cells.values():
            out[cell.name] = replace(cell, start=start)
            start += cell.size
        return out


def _joined(factors: Sequence[str]) -> str:
    """A name for several factors: ``a.q[0,1]×v`` for ``a.q[0]``, ``a.q[1]`` and ``a.v``."""
    stems: dict[str, list[str]] = {}
    for f in factors:
        stem, bracket, rest = f.partition("[")
        stems.setdefault(stem, []).append(rest.rstrip("]") if bracket else "")
    out: list[str] = []
    first = next(iter(stems), "").split(".")
    for stem, places in stems.items():
        steps = stem.split(".")
        same = 0
        while out and same < min(len(steps), len(first)) - 1 and steps[same] == first[same]:
            same += 1
        out.append(".".join(steps[same:]) + (f"[{','.join(places)}]" if any(places) else ""))
    return "×".join(out)


def _stem(tensor: str) -> str:
    """The layer that a tensor belongs to: what its weight and its bias have in common."""
    for separator in (".", "/"):
        if separator in tensor:
            return tensor.rpartition(separator)[0]
    for ending in ("_weight", "_bias"):
        if tensor.endswith(ending) and len(tensor) > len(ending):
            return tensor[: -len(ending)]
    return tensor

"""How the rescalings of a network act on the nodes and weights of its graph, for scale-equivariant metanetworks.

Every symmetry of ``weightspace.wiring.scaling`` gives the nodes of the cells it acts on a scale ``s``, and the weights
between them **grades**: a weight from ``j`` to ``i`` is multiplied by ``s_i^a s_j^b``. Two symmetries may act on the
same neurons through different tensors (the gains of two norms on one residual stream, each against the weights
after it). Then each has **copies** of the nodes for its own tensors, and the copies know each other by links.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightspace.graph.layout import Block, Cell, Vector
from weightspace.wiring.scaling import Rescaling, Scaling, scaling

if TYPE_CHECKING:
    from weightspace.graph import ParameterGraph

_log = logging.getLogger(__name__)

# An end of a block or vector: its label, and whether it is the destination.
End = tuple[str, bool]


@dataclass(eq=False)
class Copy:
    """The nodes of a cell in their part in one symmetry; the first of a cell are its own nodes.

    ``start`` is the number of the first node, ``positive`` and ``signed`` tell which scales they have.
    """

    cell: Cell
    start: int
    positive: bool
    signed: bool


@dataclass(frozen=True, eq=False)
class Scales:
    """Grades ``(a, b)`` of blocks and vectors by label (none means 0 and 0), the copies that their ends belong to,
    and the ``added`` copies, which have nodes of their own beyond those of the graph.

    A vector that two symmetries act on lies between a node of one and the same node of the other, as a diagonal
    weight: the gain of a batch norm, against what comes in and for what goes out. Others have no source.
    """

    grades: dict[str, tuple[int, int]] = field(default_factory=dict)
    ends: dict[End, Copy] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)
    added: list[Copy] = field(default_factory=list)

    def start(self, part: Vector, cell: Cell, dst: bool) -> int:
        """Number of the first node that an end of a part belongs to."""
        found = self.ends.get((part.label, dst))
        return cell.start if found is None else found.start


def scales_of(graph: ParameterGraph, positive: bool = True, signed: bool = True) -> Scales:
    """The scales of a graph's nodes: of positive rescalings, sign flips or both.

    A symmetry is left out, with a line in the log, where it (and its products with those before it) acts on an end
    of a block that another one acts on, on a vector as a third, or by another power than 1 and -1. Raises
    ``UnprovedWiringError`` as ``scaling`` does.
    """
    assert graph.wiring is not None
    group = scaling(graph.wiring)
    placed = _Placed(graph)
    members = [("positive", k, g.factor) for k, g in enumerate(group.generators) if positive]
    members += [("signed", k, f.factor) for k, f in enumerate(group.flips) if signed]
    found = [(kind, factor, _grades(graph, group, kind, k, factor)) for kind, k, factor in members]
    left = -1
    # One that does not fit may when others are in place.
    while left != len(found):
        left = len(found)
        found = [f for f in found if f[2] is None or not placed.add(f[2], f[0] == "signed")]
    for kind, factor, _ in found:
        _log.warning(
            "%s: the %s of %s is not kept by scale-equivariant states: others act on the same weights, "
            "or it acts by another power than 1 and -1",
            graph.origin, "rescaling" if kind == "positive" else "sign flip", factor,
        )  # fmt: skip
    return placed.scales()


def _grades(
    graph: ParameterGraph, group: Scaling, kind: str, number: int, factor: str
) -> dict[str, tuple[int, int]] | None:
    """Grades of all parts under one symmetry, read off a random element of it; None where they are no grades."""
    generator = torch.Generator().manual_seed(number)
    some = group.random(0)
    one = Rescaling(tuple(map(torch.ones_like, some.scales)), tuple(map(torch.ones_like, some.signs)))
    shape = one.scales[number].shape if kind == "positive" else one.signs[number].shape
    if kind == "positive":
        drawn = torch.exp(torch.randn(shape, generator=generator, dtype=torch.float64))
        element = Rescaling(_with(one.scales, number, drawn), one.signs)
        powers: Sequence[int] = (0, 1, -1)
    else:
        drawn = 1.0 - 2.0 * (torch.rand(shape, generator=generator) < 0.5).to(torch.float64)
        # Both signs, so that a grade shows.
        drawn.view(-1)[:2] = torch.tensor([-1.0, 1.0], dtype=torch.float64)[: drawn.numel()]
        element = Rescaling(one.scales, _with(one.signs, number, drawn))
        powers = (0, 1)
    names = dict.fromkeys(part.tensor for part in (*graph.blocks, *graph.vectors))
    ones = {n: torch.ones(graph.shapes[n], dtype=torch.float64) for n in names if not graph.dtypes[n].is_complex}
    moved = group.apply(element, ones)
    found = {}
    for part in (*graph.blocks, *graph.vectors):
        if part.tensor not in moved or bool((moved[part.tensor] == 1).all()):
            continue
        grade = _grade(graph, part, moved[part.tensor], drawn, factor, powers)
        if grade is None:
            return None
        if grade != (0, 0):
            found[part.label] = grade
    return found


def _with(values: Sequence[Tensor], number: int, value: Tensor) -> tuple[Tensor, ...]:
    return tuple(value if i == number else v for i, v in enumerate(values))


def _grade(
    graph: ParameterGraph, part: Vector, moved: Tensor, drawn: Tensor, factor: str, powers: Sequence[int]
) -> tuple[int, int] | None:
    """The powers of the scales of its two ends that a part was multiplied by."""
    actual = part.matrix(moved)
    dst = _of_nodes(graph, graph.cells[part.dst], factor, drawn)
    if not isinstance(part, Block):
        at = None if dst is None else dst[part.index()].unsqueeze(1)
        for a in powers:
            expected = torch.ones(1, 1, dtype=torch.float64) if at is None else at**a
            if torch.allclose(actual, expected.expand(actual.shape), rtol=1e-9, atol=0):
                return (a, 0)
        return None
    src = _of_nodes(graph, graph.cells[part.src], factor, drawn)
    none = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    left = none if dst is None else dst[part.index()][:, :, None, None]
    right = none if src is None else src[part.source_index()][:, None, :, None]
    for a, b in product(powers, powers):
        if torch.allclose(actual, (left**a * right**b).expand(actual.shape), rtol=1e-9, atol=0):
            return (a, b)
    return None


def _of_nodes(graph: ParameterGraph, cell: Cell, factor: str, drawn: Tensor) -> Tensor | None:
    """The scale of every node of a cell, or None where the factor is not part of it."""
    assert graph.wiring is not None
    needed = (*graph.wiring.factors[factor].over, factor)
    if any(f not in cell.factors for f in needed):
        return None
    places = cell.positions().T
    return drawn[tuple(places[cell.factors.index(f)] for f in needed)]


# Powers of the scales of the ends that a symmetry acts on; for signs 1.
_Powers = dict[End, int]


@dataclass(frozen=True, eq=False)
class _Taken:
    powers: _Powers
    copies: dict[str, Copy]

    @property
    def signed(self) -> bool:
        return all(c.signed for c in self.copies.values())

    @property
    def positive(self) -> bool:
        return all(c.positive for c in self.copies.values())


class _Placed:
    """The symmetries taken so far, and which copy of its nodes each end of a block or vector belongs to."""

    def __init__(self, graph: ParameterGraph) -> None:
        self.graph = graph
        self.total = graph.num_nodes
        self.taken: list[_Taken] = []
        self.copies: list[Copy] = []
        # What acts on an end, with its power: one on an end of a block, up to two on a vector.
        self.held: dict[End, list[_Taken]] = {}
        self.cells: dict[End, str] = {}
        self.room: dict[End, int] = {}
        for part in (*graph.blocks, *graph.vectors):
            self.cells[part.label, True] = part.dst
            self.room[part.label, True] = 1 if isinstance(part, Block) else 2
            if isinstance(part, Block):
                self.cells[part.label, False] = part.src
                self.room[part.label, False] = 1

    def add(self, grades: dict[str, tuple[int, int]], signed: bool) -> bool:
        """Give the ends of a symmetry their copies; False where they belong to others.

        Together with those before it, its product with one of them says the same: the first product that fits is
        taken.
        """
        powers: _Powers = {(n, at): p for n, (a, b) in grades.items() for at, p in ((True, a), (False, b)) if p}
        seen = set()
        while True:
            if not powers or self._same(powers, signed):
                return True
            seen.add(frozenset(powers.items()))
            full = next((end for end in powers if len(self.held.get(end, ())) >= self.room[end]), None)
            if full is None:
                break
            products = [_product(powers, t, full, signed) for t in self.held[full]]
            fitting = [p for p in products if p is not None and frozenset(p.items()) not in seen]
            if not fitting:
                return False
            powers = fitting[0]
        copies: dict[str, Copy] = {}
        taken = _Taken(powers, copies)
        for end in powers:
            name = self.cells[end]
            if name not in copies:
                copies[name] = self._copy(self.graph.cells[name], signed)
            self.held.setdefault(end, []).append(taken)
        self.taken.append(taken)
        return True

    def _same(self, powers: _Powers, signed: bool) -> bool:
        """Does it act as another one does, by a sign or a factor more? Then their nodes have one scale for both."""
        inverse = {end: -power for end, power in powers.items()}
        for known in self.taken:
            if signed and known.powers.keys() == powers.keys():
                for copy in known.copies.values():
                    copy.signed = True
                return True
            if not signed and known.positive and known.powers in (powers, inverse):
                return True
        return False

    def _copy(self, cell: Cell, signed: bool) -> Copy:
        first = all(c.cell.name != cell.name for c in self.copies)
        made = Copy(cell, cell.start if first else self.total, not signed, signed)
        self.total += 0 if first else cell.size
        self.copies.append(made)
        return made

    def scales(self) -> Scales:
        found = Scales(copies=self.copies, added=[c for c in self.copies if c.start != c.cell.start])
        for end, held in self.held.items():
            label, dst = end
            cell = self.cells[end]
            # Of two scales of a vector that with the power 1 is where it leads.
            for at, taken in zip((dst, not dst), sorted(held, key=lambda t: -t.powers[end]), strict=False):
                copy = found.ends[label, at] = taken.copies[cell]
                # Under signs any odd power serves; with these a weight carries h to h.
                power = taken.powers[end] if copy.positive else 1 if at else -1
                a, b = found.grades.get(label, (0, 0))
                found.grades[label] = (power, b) if at else (a, power)
        return found


def _product(powers: _Powers, other: _Taken, end: End, signed: bool) -> _Powers | None:
    """The product with a power of another symmetry that leaves an end alone; None where it is no such symmetry."""
    if not (other.signed if signed else other.positive):
        return None
    times = -powers[end] * other.powers[end]
    found: _Powers = {}
    for e in {**powers, **other.powers}:
        power = powers.get(e, 0) + times * other.powers.get(e, 0)
        power = power % 2 if signed else power
        if abs(power) > 1:
            return None
        if power:
            found[e] = power
    return found

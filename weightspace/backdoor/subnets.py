"""A subnet that stands apart: elements of many axes that are linked among themselves and hardly to any others.

Subnet replacement (SRA, Qi et al. 2022) puts a narrow network beside a trained one: weights between its elements and
all others are zero, or small. Every block of weights says how much of two elements' links they have in common; elements
are joined from the strongest such share downwards (single linkage over all axes at once), and of the groups that arise
the one with the smallest conductance, the share of its links that leave it, is the subnet if there is any. Which
positions the elements have plays no part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from weightspace.backdoor.outputs import parts_of
from weightspace.graph.layout import Cell
from weightspace.wiring.wiring import Wiring

APART = 0.5
"""Conductance below which a group counts as a subnet of its own (see ``tests/benchmarks/backdoor_localisation.py``)."""
NEIGHBOURS = 8
"""Strongest links of each element in each block that can join it to others."""
SMALL = 1e-8
"""Energy of links, of the mean in their block, under which they are noise of rounding and say nothing."""
SPANNED = 0.5
"""Share of the axes that a group has to have elements of."""


@dataclass(frozen=True, eq=False)
class Separation:
    """How far elements stand apart together.

    ``scores``: factor -> (*over, size) in [0, 1]: one minus the conductance of the best group that an element belongs
    to, 0 for elements of none. ``group``: factor -> positions of the best group; ``conductance`` of it, 1 without any.
    """

    scores: Mapping[str, Tensor]
    group: Mapping[str, Tensor]
    conductance: float

    @property
    def apart(self) -> bool:
        return self.conductance < APART


@dataclass(frozen=True, eq=False)
class Share:
    """Shares of links between elements ``rows (m,)`` and ``columns (n,)`` of a ``block``: ``values (m, n)``."""

    block: str

    rows: Tensor
    columns: Tensor
    values: Tensor

    @cached_property
    def down(self) -> Tensor:
        return self.values.sum(1)

    @cached_property
    def across(self) -> Tensor:
        return self.values.sum(0)


def separation(wiring: Wiring, tensors: Mapping[str, Tensor]) -> Separation:
    """How far groups of elements stand apart in a network, from its weights alone.

    Heads and what is like them count as wholes: what is fibred over them gets their score.
    """
    starts, total = numbered(wiring)
    owner = torch.zeros(total, dtype=torch.long)
    for number, (name, start) in enumerate(starts.items()):
        owner[start : start + wiring.factors[name].size] = number
    shares = shares_of(wiring, tensors, starts)
    groups = _joined(shares, owner, len(starts), total)
    values = torch.zeros(total, dtype=torch.float64)
    leaves = [conductance(shares, group, total) for group in groups]
    least = min(leaves, default=1.0)
    inside = torch.zeros(total, dtype=torch.bool)
    for group, out in zip(groups, leaves, strict=True):
        values[group] = values[group].clamp(min=1 - out)
        # Several may stand apart altogether.
        inside[group] |= out <= least + 1e-9
    scores, found = {}, {}
    for name, factor in wiring.free.items():
        if factor.over:
            base = next((o for o in factor.over if o in starts), None)
            shape = [wiring.factors[o].size for o in factor.over] + [factor.size]
            scores[name] = torch.zeros(shape)
            if base is not None:
                at = factor.over.index(base)
                own = values[starts[base] : starts[base] + wiring.factors[base].size].float()
                scores[name] = own.view([-1 if i == at else 1 for i in range(len(shape))]).expand(shape).contiguous()
            continue
        part = slice(starts[name], starts[name] + factor.size)
        scores[name] = values[part].float()
        found[name] = torch.nonzero(inside[part]).flatten()
    return Separation(scores, found, least)


def conductance(shares: list[Share], group: Tensor, total: int) -> float:
    """Share of a group's links that leave it, over that of a random group with as many links; about 1 by chance.

    A group without links has 1.
    """
    member = torch.zeros(total, dtype=torch.float64)
    member[group] = 1
    within = own = whole = 0.0
    for s in shares:
        rows, columns = member[s.rows], member[s.columns]
        within += 2 * float(rows @ s.values @ columns)
        own += float(rows @ s.down + s.across @ columns)
        whole += 2 * float(s.down.sum())
    return min(1.0, (1 - within / own) / (1 - own / whole)) if 0 < own < whole else 1.0


def numbered(wiring: Wiring) -> tuple[dict[str, int], int]:
    """Numbers for the elements of every free factor that is not inside another: where each begins, and how many."""
    starts, total = {}, 0
    for name, factor in wiring.free.items():
        if not factor.over:
            starts[name] = total
            total += factor.size
    return starts, total


def shares_of(wiring: Wiring, tensors: Mapping[str, Tensor], starts: Mapping[str, int]) -> list[Share]:
    """For every block between two such factors how much of their links its elements have in common, in [0, 1].

    The energy of a link over the geometric mean of that of all links of its two ends in this block.
    """
    lain = parts_of(wiring)
    found = []
    for block in lain.blocks:
        if wiring.roles.get(block.tensor, "weight") not in ("weight", "lookup") or block.tensor not in tensors:
            continue
        ends = _units(lain.cells[block.dst], starts), _units(lain.cells[block.src], starts)
        if ends[0] is None or ends[1] is None or not tensors[block.tensor].is_floating_point():
            continue
        energy = block.matrix(tensors[block.tensor].detach().double()).square().sum(3)
        rows, columns = ends[0][block.index()], ends[1][block.source_index()]
        r, m = rows.unique(return_inverse=True)
        c, n = columns.unique(return_inverse=True)
        whole = torch.zeros(len(r), len(c), dtype=torch.float64)
        whole.index_put_((m[:, :, None].expand(energy.shape), n[:, None, :].expand(energy.shape)), energy, True)
        total = float(whole.sum())
        if total <= 0:
            continue
        down = whole.sum(1) + SMALL * total / len(r)
        across = whole.sum(0) + SMALL * total / len(c)
        found.append(Share(block.label, r, c, whole / (down[:, None] * across[None]).sqrt()))
    return found


def _units(cell: Cell, starts: Mapping[str, int]) -> Tensor | None:
    """The element that each node of a cell belongs to; None where nodes of it may not be moved."""
    which = [i for i, f in enumerate(cell.factors) if f in starts]
    if len(which) != 1:
        return None
    return cell.positions()[:, which[0]] + starts[cell.factors[which[0]]]


def _joined(shares: list[Share], owner: Tensor, factors: int, total: int) -> list[Tensor]:
    """Groups that arise by single linkage, span enough axes and hold at most half of each."""
    edges = []
    for s in shares:
        strong = torch.zeros_like(s.values, dtype=torch.bool)
        for dim in (0, 1):
            k = min(NEIGHBOURS, s.values.shape[dim])
            strong.scatter_(dim, s.values.topk(k, dim).indices, True)
        i, j = torch.nonzero(strong & (s.values > 0), as_tuple=True)
        edges.append(torch.stack([s.values[i, j], s.rows[i].double(), s.columns[j].double()]))
    if not edges:
        return []
    weight, a, b = torch.cat(edges, 1)
    order = weight.argsort(descending=True, stable=True)
    sizes = torch.bincount(owner, minlength=factors)
    linked = len({int(o) for s in shares for o in (*owner[s.rows].unique(), *owner[s.columns].unique())})
    parent, members = list(range(total)), [[i] for i in range(total)]
    found: list[Tensor] = []

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def keep(group: list[int]) -> None:
        if len(group) < max(2, SPANNED * linked):
            return
        counts = torch.bincount(owner[torch.tensor(group)], minlength=factors)
        if int((counts > 0).sum()) >= max(2, SPANNED * linked) and bool((2 * counts <= sizes).all()):
            found.append(torch.tensor(sorted(group)))

    for i, j in zip(a[order].long().tolist(), b[order].long().tolist(), strict=True):
        x, y = root(i), root(j)
        if x == y:
            continue
        if len(members[x]) < len(members[y]):
            x, y = y, x
        parent[y] = x
        members[x] = members[x] + members[y]
        members[y] = []
        keep(members[x])
    return found


__all__ = ["APART", "Separation", "Share", "conductance", "numbered", "separation", "shares_of"]

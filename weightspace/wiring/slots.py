"""Where the elements of a factor lie in the tensors that carry it, and how they are scaled there.

A *slot* is one occurrence of a factor in a tensor: the rows of a weight, the query part of a packed projection,
either side of a recurrent matrix. Each position of the slot belongs to one element of the factor: to one ``(*over,
position)`` where the factor is fibred.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

import torch

from weightspace.wiring.axis import Factor
from weightspace.wiring.wiring import Block, Permutation, Wiring, _addresses, _joint


@dataclass(frozen=True, eq=False)
class Slot:
    """One occurrence of a factor: ``label`` has the sizes of ``dims`` and holds an element's number, or -1 outside.

    ``name`` is the tensor's, with a range where the factor occurs in the tensor more than once. ``place`` tells
    occurrences apart; those of two factors that go together have the same.
    """

    factor: str
    tensor: str
    name: str
    dims: tuple[int, ...]
    place: tuple[str, tuple[int, ...], int]
    label: torch.Tensor = field(repr=False)

    def apart(self, other: Slot) -> bool:
        """Have they no position of their tensor in common?"""
        return self.dims == other.dims and not bool(((self.label >= 0) & (other.label >= 0)).any())

    def sums(self, values: torch.Tensor, count: int, batch: int = 0) -> torch.Tensor:
        """Sums of values over each of the ``count`` elements: ``(*batch, *tensor)`` to ``(*batch, count)``."""
        rest = [d for d in range(batch, values.dim()) if d - batch not in self.dims]
        order = [*range(batch), *(batch + d for d in self.dims), *rest]
        rows = values.permute(order).flatten(batch + len(self.dims)).sum(-1) if rest else values.permute(order)
        label = self.label.reshape(-1).to(values.device)
        inside = label >= 0
        flat = rows.reshape(*values.shape[:batch], -1)[..., inside]
        return flat.new_zeros(*values.shape[:batch], count).index_add(-1, label[inside], flat)

    def spread(self, values: torch.Tensor, outside: float, ndim: int) -> torch.Tensor:
        """Values ``(*batch, count)`` laid out to broadcast against ``(*batch, *tensor)``, of ``ndim`` dims."""
        padded = torch.cat((values, values.new_full((*values.shape[:-1], 1), outside)), -1)
        lead = values.dim() - 1
        # Label -1 is the last one.
        laid = padded[..., self.label]
        order = sorted(range(len(self.dims)), key=lambda k: self.dims[k])
        laid = laid.permute(*range(lead), *(lead + k for k in order))
        sizes = {self.dims[k]: self.label.shape[k] for k in order}
        return laid.reshape(*values.shape[:-1], *(sizes.get(d, 1) for d in range(ndim)))


def count_of(factors: Mapping[str, Factor], name: str) -> int:
    """How many elements a factor has, counted over the positions that it is fibred over."""
    return prod(factors[o].size for o in factors[name].over) * factors[name].size


def shape_of(factors: Mapping[str, Factor], name: str) -> tuple[int, ...]:
    """``(*sizes of the factors that it is fibred over, size)``."""
    return (*(factors[o].size for o in factors[name].over), factors[name].size)


def slots_of(wiring: Wiring, tensors: Iterable[str]) -> dict[str, tuple[Slot, ...]]:
    """The slots of every free factor in the named tensors, in the order of those."""
    found: dict[str, list[Slot]] = {name: [] for name in wiring.free}
    still = Permutation({}, wiring.factors)
    for tensor in tensors:
        shape = wiring.shapes[tensor]
        here: list[Slot] = []
        for dims, blocks in _joint(wiring.layouts[tensor], wiring.factors):
            for b, block in enumerate(blocks):
                for d, k in ((d, k) for d, s in enumerate(block) for k in range(len(s.factors))):
                    factor = block[d].factors[k]
                    if factor in found:
                        label = _label(block, (d, k), still, [shape[i] for i in dims], wiring.factors)
                        here.append(Slot(factor, tensor, tensor, dims, (tensor, dims, b), label))
        repeated = {s.factor for s, t in pairwise(sorted(here, key=lambda s: s.factor)) if s.factor == t.factor}
        for slot in here:
            if slot.factor in repeated:
                slot = Slot(slot.factor, tensor, _ranged(slot), slot.dims, slot.place, slot.label)
            found[slot.factor].append(slot)
    return {name: tuple(slots) for name, slots in found.items()}


def _label(
    block: Block, which: tuple[int, int], still: Permutation, shape: Sequence[int], factors: Mapping[str, Factor]
) -> torch.Tensor:
    """The element's number at every position of the dims that a block lies in."""
    places = [(d, k) for d, s in enumerate(block) for k in range(len(s.factors))]
    sizes = [block[d].sizes[k] for d, k in places]
    names = [block[d].factors[k] for d, k in places]
    axis = places.index(which)
    number = torch.zeros([1] * len(places), dtype=torch.long)
    for outer in factors[names[axis]].over:
        # A factor in the same dim is meant before one of that name elsewhere.
        near = [i for i, n in enumerate(names) if n == outer and places[i][0] == which[0]]
        at = (near or [i for i, n in enumerate(names) if n == outer])[0]
        number = number * factors[outer].size + _steps(sizes, at)
    number = (number * sizes[axis] + _steps(sizes, axis)).expand(sizes)
    label = torch.full(list(shape), -1, dtype=torch.long)
    targets, _ = _addresses(block, still)
    label[tuple(targets)] = number
    return label


def _steps(sizes: Sequence[int], axis: int) -> torch.Tensor:
    return torch.arange(sizes[axis]).reshape([-1 if i == axis else 1 for i in range(len(sizes))])


def _ranged(slot: Slot) -> str:
    """The tensor's name with the ranges that the slot takes up, as one would write them in Python."""
    inside = slot.label >= 0
    ranges = [":"] * (max(slot.dims) + 1)
    for k, d in enumerate(slot.dims):
        at = inside.movedim(k, 0).flatten(1).any(1) if inside.dim() > 1 else inside
        at = at.nonzero().flatten()
        ranges[d] = f"{int(at[0])}:{int(at[-1]) + 1}"
    return f"{slot.tensor}[{', '.join(ranges)}]"


def multiply(tensor: torch.Tensor, factors: Sequence[tuple[Slot, torch.Tensor]], batch: int = 0) -> torch.Tensor:
    """A tensor ``(*batch, …)`` times factors ``(*batch, count)`` along slots, computed in float64, in its own dtype."""
    out = tensor.to(torch.float64) if factors else tensor
    for slot, values in factors:
        out = out * slot.spread(values.to(out.device), 1.0, tensor.dim() - batch)
    return out.to(tensor.dtype)

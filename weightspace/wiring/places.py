"""Where tensors carry the free factors of a wiring, and a factor's view of a tensor.

A *place* is one occurrence of a factor in a tensor. Its view lays the tensor out as ``(*over, size, rest)``: the
factors that it is fibred over, its own positions, and everything else. Two networks of one wiring are compared along a
factor by one matrix product of their views.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from weightspace.wiring.axis import Factor
from weightspace.wiring.wiring import Block, Wiring, _joint


@dataclass(frozen=True, eq=False)
class Place:
    """One occurrence of ``factor`` in ``tensor``; ``others`` are the free factors that lie there besides.

    ``repeated`` says that the factor occurs in this tensor more than once (recurrent and square weights).
    """

    factor: str
    tensor: str
    others: tuple[str, ...]
    repeated: bool
    dims: tuple[int, ...]
    # Which of the blocks that tile these dims.
    block: int
    positions: tuple[Tensor | None, ...] = field(repr=False)
    sizes: tuple[tuple[int, ...], ...] = field(repr=False)
    front: tuple[int, ...] = field(repr=False)

    def view(self, tensor: Tensor) -> Tensor:
        """The part of the tensor that this place is about, ``(*over, size, rest)``.

        The tensor may have further dims behind the wiring's own (real and imaginary parts); they are rest.
        """
        for dim, positions in zip(self.dims, self.positions, strict=True):
            if positions is not None:
                tensor = tensor.index_select(dim, positions.to(tensor.device))
        parts: list[int] = []
        for dim, size in enumerate(tensor.shape):
            parts += self.sizes[self.dims.index(dim)] if dim in self.dims else (size,)
        spread = tensor.reshape(parts)
        rest = [i for i in range(spread.dim()) if i not in self.front]
        lead = [parts[i] for i in self.front]
        return spread.permute(*self.front, *rest).reshape(*lead, -1)

    def put(self, tensor: Tensor, view: Tensor) -> Tensor:
        """The tensor with this place's part replaced by ``view (*over, size, rest)``; a new tensor."""
        shape = list(tensor.shape)
        for dim, positions in zip(self.dims, self.positions, strict=True):
            if positions is not None:
                shape[dim] = len(positions)
        parts: list[int] = []
        for dim, size in enumerate(shape):
            parts += self.sizes[self.dims.index(dim)] if dim in self.dims else (size,)
        rest = [i for i in range(len(parts)) if i not in self.front]
        order = [*self.front, *rest]
        spread = view.reshape([parts[i] for i in order])
        part = spread.permute(*(order.index(i) for i in range(len(order)))).reshape(shape)
        chosen = [(d, p) for d, p in zip(self.dims, self.positions, strict=True) if p is not None]
        if not chosen:
            return part
        index: list[Tensor | None] = []
        for d in range(tensor.dim()):
            here = next((p for e, p in chosen if e == d), torch.arange(tensor.shape[d]))
            index.append(here.to(tensor.device).reshape([-1 if e == d else 1 for e in range(tensor.dim())]))
        return tensor.index_put(index, part)


def places(wiring: Wiring) -> dict[str, tuple[Place, ...]]:
    """The places of every free factor, in the order of the tensors; kept on the wiring."""
    known = wiring.kept.get("places")
    if isinstance(known, dict):
        return known
    result = places_of(wiring, wiring.free)
    wiring.kept["places"] = result
    return result


def places_of(wiring: Wiring, factors: Mapping[str, Factor]) -> dict[str, tuple[Place, ...]]:
    """The places of the given factors; ``over`` may name others than the wiring's, which have to lie in every block."""
    found: dict[str, list[Place]] = {name: [] for name in factors}
    for tensor, layout in wiring.layouts.items():
        shape = wiring.shapes[tensor]
        if prod(shape) == 0:
            continue
        here: list[_Spot] = []
        for dims, blocks in _joint(layout, wiring.factors):
            for number, block in enumerate(blocks):
                rows = ((d, k, f) for d, s in enumerate(block) for k, f in enumerate(s.factors))
                here += [(f, dims, block, (d, k), number) for d, k, f in rows if f in factors]
        names = [spot[0] for spot in here]
        for f, dims, block, which, number in here:
            others = tuple(n for n in dict.fromkeys(names) if n != f and factors[n].size > 1)
            repeated = _repeats(f, here)
            found[f].append(_place(f, tensor, others, repeated, shape, dims, block, which, number, factors[f].over))
    return {name: tuple(row) for name, row in found.items()}


# A factor, the dims and the block it is in, which segment and factor there, and the block's number.
_Spot = tuple[str, tuple[int, ...], Block, tuple[int, int], int]


def _repeats(factor: str, here: list[_Spot]) -> bool:
    """Whether one occurrence shares entries of the tensor with another: not so for segments laid end to end."""
    mine = [(dims, block, which[0]) for f, dims, block, which, _ in here if f == factor]
    for i, (dims, block, d) in enumerate(mine):
        for other_dims, other_block, e in mine[i + 1 :]:
            if dims != other_dims or d != e or block is other_block:
                return True
    return False


def _place(
    factor: str, tensor: str, others: tuple[str, ...], repeated: bool, shape: tuple[int, ...], dims: tuple[int, ...],
    block: Block, which: tuple[int, int], number: int, over: tuple[str, ...],
) -> Place:  # fmt: skip
    positions: list[Tensor | None] = []
    for dim, segment in zip(dims, block, strict=True):
        at = torch.tensor([segment.start])
        for size, stride in zip(segment.sizes, segment.strides, strict=True):
            at = (at[:, None] + stride * torch.arange(size)).reshape(-1)
        whole = len(at) == shape[dim] and bool((at == torch.arange(shape[dim])).all())
        positions.append(None if whole else at)
    sizes = tuple(segment.sizes for segment in block)
    # Number of each factor's dim once every dim of the block is spread out over its factors.
    starts, at_dim = {}, 0
    for dim in range(len(shape)):
        starts[dim] = at_dim
        at_dim += len(sizes[dims.index(dim)]) if dim in dims else 1
    numbers = {(d, k): starts[dims[d]] + k for d, s in enumerate(block) for k in range(len(s.factors))}
    front = []
    for outer in over:
        held = [(d, k) for d, s in enumerate(block) for k, f in enumerate(s.factors) if f == outer]
        # One in the same dim is meant before one of that name elsewhere.
        near = [at for at in held if at[0] == which[0]]
        front.append(numbers[(near or held)[0]])
    front.append(numbers[which])
    return Place(factor, tensor, others, repeated, dims, number, tuple(positions), sizes, tuple(front))

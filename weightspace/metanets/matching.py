"""Bringing one network next to another of the same wiring: weight matching over the free factors.

Ainsworth et al. 2023 ("Git Re-Basin") permute one layer at a time so that the inner product of the two networks'
weights grows, each a linear assignment, until nothing moves. Here the layers are the free factors of a wiring, so
that heads, the channels inside each head, groups and gates are matched as well as neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from weightspace.wiring.axis import Factor
from weightspace.wiring.wiring import Block, Permutation, Wiring, _joint


@dataclass(frozen=True)
class _Place:
    """Where a tensor carries a factor: ``view`` has the factors it is fibred over first, then it, then the rest."""

    tensor: str
    dims: tuple[int, ...]
    positions: tuple[torch.Tensor, ...]
    sizes: tuple[tuple[int, ...], ...]
    front: tuple[int, ...]

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of the tensor that this place is about, ``(*over, size, rest)``."""
        shape = list(tensor.shape)
        for dim, positions in zip(self.dims, self.positions, strict=True):
            if len(positions) != tensor.shape[dim]:
                tensor = tensor.index_select(dim, positions)
        parts: list[int] = []
        for dim, size in enumerate(shape):
            parts += self.sizes[self.dims.index(dim)] if dim in self.dims else (size,)
        spread = tensor.reshape(parts)
        rest = [i for i in range(spread.dim()) if i not in self.front]
        lead = [parts[i] for i in self.front]
        return spread.permute(*self.front, *rest).reshape(*lead, -1)


class Matcher:
    """Weight matching on one wiring; what it has to know of the wiring is worked out once."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self._places: dict[str, list[_Place]] = {name: [] for name in wiring.free}
        for tensor, layout in wiring.layouts.items():
            for dims, blocks in _joint(layout, wiring.factors):
                for block in blocks:
                    for factor, place in _places(tensor, wiring.shapes[tensor], dims, block, wiring.free):
                        self._places[factor].append(place)

    def match(
        self, fixed: Mapping[str, torch.Tensor], moving: Mapping[str, torch.Tensor], rounds: int = 20
    ) -> tuple[Permutation, dict[str, torch.Tensor]]:
        """The permutation that brings ``moving`` near ``fixed``, and ``moving`` after it.

        Each tensor counts relative to its root mean squares, so that batch-norm variances do not outweigh
        kernels. A factor moves only when that raises the inner product, so the descent ends; it finds a local
        optimum. At most ``rounds`` passes over all factors.
        """
        from scipy.optimize import linear_sum_assignment

        scale = {name: 1 / max(_rms(fixed[name]) * _rms(moving[name]), 1e-30) for name in fixed}
        found, now = self.wiring.identity(), dict(moving)
        for _ in range(rounds):
            moved = False
            for name, factor in self.wiring.free.items():
                places = [p for p in self._places[name] if p.tensor in now]
                if not places or factor.size < 2:
                    continue
                alike = torch.zeros(1, dtype=torch.float64)
                for place in places:
                    a, b = place.view(fixed[place.tensor]).double(), place.view(now[place.tensor]).double()
                    alike = alike + scale[place.tensor] * (a @ b.transpose(-1, -2))
                rows = alike.reshape(-1, factor.size, factor.size).numpy()
                best = [torch.from_numpy(linear_sum_assignment(row, maximize=True)[1]) for row in rows]
                step = Permutation({name: torch.stack(best).reshape(alike.shape[:-1])}, self.wiring.factors)
                if step.is_identity:
                    continue
                carriers = {p.tensor: now[p.tensor] for p in places}
                after = self.wiring.apply(step, carriers)
                # A factor on both sides of one tensor is matched one side at a time: see whether it helped.
                gain = sum(scale[n] * float((fixed[n].double() * (after[n] - now[n])).sum()) for n in carriers)
                if gain > 1e-9:
                    found, moved = found.compose(step), True
                    now.update(after)
            if not moved:
                break
        return found, now


def matcher_of(wiring: Wiring) -> Matcher:
    """The matcher of a wiring, kept on it."""
    known = wiring.kept.get("matcher")
    if not isinstance(known, Matcher):
        wiring.kept["matcher"] = known = Matcher(wiring)
    return known


def _rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 1.0


def _places(
    tensor: str, shape: tuple[int, ...], dims: tuple[int, ...], block: Block, free: Mapping[str, Factor]
) -> list[tuple[str, _Place]]:
    positions: list[torch.Tensor] = []
    for segment in block:
        at = torch.tensor([segment.start])
        for size, stride in zip(segment.sizes, segment.strides, strict=True):
            at = (at[:, None] + stride * torch.arange(size)).reshape(-1)
        positions.append(at)
    sizes = tuple(segment.sizes for segment in block)
    # Number of each factor's dim once every dim of the block is spread out over its factors.
    starts, at_dim = {}, 0
    for dim in range(len(shape)):
        starts[dim] = at_dim
        at_dim += len(sizes[dims.index(dim)]) if dim in dims else 1
    numbers = [(f, d, starts[dims[d]] + k) for d, s in enumerate(block) for k, f in enumerate(s.factors)]
    found = []
    for factor, d, number in numbers:
        if factor not in free or prod(shape) == 0:
            continue
        front = []
        for outer in free[factor].over:
            # One in the same dim is meant before one of that name elsewhere.
            inside = [n for f, e, n in numbers if f == outer and e == d]
            front.append(inside[0] if inside else next(n for f, _, n in numbers if f == outer))
        found.append((factor, _Place(tensor, dims, tuple(positions), sizes, (*front, number))))
    return found

"""Soft maps of a wiring's factors, also between networks of different widths.

A permutation moves the elements of a factor; a soft map mixes them. It comes in two halves: ``write`` (m, n) makes m
elements out of n wherever a tensor writes the factor (rows of weights, biases, norms), ``read`` (m, n) wherever a
weight sums over it. With both a permutation matrix this is the group action.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from weightspace.errors import AlignmentError
from weightspace.wiring.places import places
from weightspace.wiring.wiring import Wiring, _joint


@dataclass(frozen=True, eq=False)
class Map:
    """A soft map of one factor: ``write`` and ``read``, both ``(*over, m, n)``."""

    write: Tensor
    read: Tensor


def carry(
    tensors: Mapping[str, Tensor], wiring: Wiring, maps: Mapping[str, Map], only: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The tensors of ``wiring`` (all, or ``only`` some) after the maps of their factors; differentiable.

    Factors without a map stay. A factor that others are fibred over is mapped first; what is inside is then mapped per
    new position, as a permutation does it. Widths may change where a factor shares its dim with nothing but what it is
    fibred over. Raises ``AlignmentError`` where that is not so.
    """
    order = sorted(maps, key=lambda f: len(wiring.factors[f].over))
    out = {}
    for name in tensors if only is None else only:
        x = tensors[name]
        layout = wiring.layouts.get(name)
        if layout is None or not x.is_floating_point():
            out[name] = x
            continue
        read = wiring.reads.get(name)
        for dims, blocks in _joint(layout, wiring.factors):
            inside = [f for f in order if any(f in s.factors for b in blocks for s in b)]
            if not inside:
                continue
            if len(dims) == 1:
                x = _along(name, x, dims[0], [b[0] for b in blocks], maps, order, wiring, dims[0] == read)
                continue
            for f in inside:
                if maps[f].write.shape[-1] != maps[f].write.shape[-2]:
                    raise AlignmentError(
                        f"the width of factor {f!r} cannot change: tensor {name!r} ties it to another of its dims "
                        "(a packed projection); align networks of one width"
                    )
                for place in places(wiring)[f]:
                    if place.tensor == name and place.dims == dims:
                        here = _dim(place.dims, place.sizes, place.front[-1], x.dim())
                        matrix = maps[f].read if here == read else maps[f].write
                        x = place.put(x, matrix.to(x.dtype) @ place.view(x))
        out[name] = x
    return out


def _along(
    name: str, x: Tensor, d: int, segments: Sequence[object], maps: Mapping[str, Map], order: Sequence[str],
    wiring: Wiring, reading: bool,
) -> Tensor:  # fmt: skip
    """One dim of a tensor, part by part."""
    pieces = []
    at = 0
    for s in sorted(segments, key=lambda s: s.start):  # type: ignore[attr-defined]
        sizes, names = list(s.sizes), list(s.factors)  # type: ignore[attr-defined]
        plain = list(s.strides) == [prod(sizes[k + 1 :]) for k in range(len(sizes))]  # type: ignore[attr-defined]
        if s.start != at or not plain:  # type: ignore[attr-defined]
            raise AlignmentError(f"dim {d} of tensor {name!r} is laid out in a way that soft maps do not follow")
        at += prod(sizes)
        piece = x.narrow(d, s.start, prod(sizes))  # type: ignore[attr-defined]
        piece = piece.reshape(*x.shape[:d], *sizes, *x.shape[d + 1 :])
        for f in order:
            for k in [k for k, n in enumerate(names) if n == f]:
                over = [d + names.index(o) for o in wiring.factors[f].over]
                piece = _mix(piece, maps[f].read if reading else maps[f].write, over, d + k)
        pieces.append(piece.flatten(d, d + len(sizes) - 1) if sizes else piece.unsqueeze(d))
    if at != x.shape[d]:
        raise AlignmentError(f"dim {d} of tensor {name!r} has entries that its wiring does not name")
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, d)


def _mix(x: Tensor, matrix: Tensor, over: Sequence[int], axis: int) -> Tensor:
    """``y[…, i, …] = sum_j M[*over, i, j] x[…, j, …]``."""
    rest = [k for k in range(x.dim()) if k not in over and k != axis]
    order = [*over, *rest, axis]
    moved = x.permute(order)
    lead = moved.shape[: len(over)]
    flat = moved.reshape(*lead, -1, x.shape[axis])
    mixed = flat @ matrix.to(x.dtype).transpose(-1, -2)
    back = mixed.reshape(*moved.shape[:-1], matrix.shape[-2])
    return back.permute([order.index(k) for k in range(x.dim())])


def _dim(dims: Sequence[int], sizes: Sequence[tuple[int, ...]], number: int, count: int) -> int:
    """The tensor's dim that the ``number``-th dim of a spread-out block belongs to."""
    at = 0
    for d in range(count):
        at += len(sizes[dims.index(d)]) if d in dims else 1
        if number < at:
            return d
    raise AssertionError("a place lies outside its tensor")


__all__ = ["Map", "carry"]

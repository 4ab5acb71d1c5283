"""Networks that are others once more: with equal values, or with values that were rounded.

Of two networks with equal values neither is the parent as far as weights tell: the order is what records say, or else
that of the models, and no more than that. A rounded one is the child of the finer one, which cannot be made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from weightspace.lineage.geometry import Geometry
from weightspace.lineage.steps import Step, same_but_rounded

_ROUNDED = 0.08
"""Squared relative distance up to which a network may be another's copy with rounded values."""
_EQUAL = 1e-10
_NEAR = 4

Told = Mapping[str, Collection[str]]
"""Child -> the models that its file names as parents."""


@dataclass(frozen=True)
class Copy:
    """``of``: number of the original; ``undecided``: the weights do not say which of the two is the original.

    ``recorded``: a file says which.
    """

    of: int
    how: Step
    undecided: bool = False
    recorded: bool = False


def copies(
    names: Sequence[str], shape: Geometry, network: Callable[[str], Mapping[str, Tensor]], tensors: Sequence[str],
    told: Told,
) -> dict[int, Copy]:  # fmt: skip
    """The networks of a family that are copies of others of it: number -> of which, and how."""
    relative = shape.squared / np.maximum(shape.norms[:, None] + shape.norms[None, :], shape.tiny)
    found: dict[int, Copy] = {}
    held: dict[tuple[int, int], Step | None] = {}

    def step(a: int, b: int) -> Step | None:
        if (a, b) not in held:
            held[a, b] = same_but_rounded(network(names[a]), network(names[b]), tensors)
        return held[a, b]

    for members in _equal(relative, shape, step):
        first, recorded = original([names[i] for i in members], told)
        for b in members:
            if b != members[first]:
                equal = step(members[first], b) or Step("copy", "the same values", 0, len(tensors))
                found[b] = Copy(members[first], equal, undecided=True, recorded=recorded)
    for b in (i for i in range(shape.count) if i not in found):
        for a in [int(i) for i in shape.near[b] if int(i) not in found][:_NEAR]:
            how = None if relative[a, b] > _ROUNDED else step(a, b)
            if how is not None and how.kind != "copy":
                found[b] = Copy(a, how)
                # Its equals were rounded from the same network, unless a file says that they were copied afterwards.
                for c in [c for c, x in found.items() if x.of == b and x.undecided and not x.recorded]:
                    again = step(a, c)
                    if again is not None and again.kind != "copy":
                        found[c] = Copy(a, again)
                break
    return found


def original(names: Sequence[str], told: Told) -> tuple[int, bool]:
    """Which of some equal models is put first, and whether that is for what files say.

    The one whose file names none of the others while most others name it; else the first.
    """
    among = set(names)
    said = [sum(n in told.get(o, ()) for o in names) for n in names]
    says = [bool(among & set(told.get(n, ()))) for n in names]
    best = max(range(len(names)), key=lambda i: (not says[i], said[i], -i))
    return best, said[best] > 0


def _equal(
    relative: np.ndarray[tuple[int, ...], np.dtype[np.float64]], shape: Geometry,
    step: Callable[[int, int], Step | None],
) -> list[list[int]]:  # fmt: skip
    """Sets of networks with equal values."""
    top = list(range(shape.count))
    for b in range(shape.count):
        for a in (int(i) for i in shape.near[b][:_NEAR]):
            if relative[a, b] > _EQUAL or top[a] == top[b]:
                continue
            how = step(a, b)
            if how is not None and how.kind == "copy":
                old, new = max(top[a], top[b]), min(top[a], top[b])
                top = [new if t == old else t for t in top]
    groups: dict[int, list[int]] = {}
    for i, t in enumerate(top):
        groups.setdefault(t, []).append(i)
    return [g for g in groups.values() if len(g) > 1]


__all__ = ["Copy", "Told", "copies", "original"]

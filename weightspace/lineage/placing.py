"""A family put in order: the forest of the regime that fits it best, forward or back in time, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from weightspace.lineage.calibrated import CONFIDENCE, DIRECTION, REGIMES
from weightspace.lineage.confidence import features, probability
from weightspace.lineage.geometry import Geometry
from weightspace.lineage.tree import OUTSIDE, Forest, Weights, forest

TURNED = 6.0
"""How much likelier (log) a family has to be with time turned around to be told so."""
MANY = 128
PART = 64
"""Of families of more than ``MANY`` networks, three parts of so many say in which regime all are read."""


@dataclass(frozen=True, eq=False)
class Placed:
    """The likeliest forest of all regimes; ``turned``: with time turned around, where that is much likelier.

    ``sure`` and ``way``: of each network, probability of its parent, and that the edge leads this way.
    """

    forest: Forest
    turned: bool
    sure: Mapping[int, float]
    way: Mapping[int, float]


def place(shape: Geometry, blocked: Mapping[int, set[int]] | None = None) -> Placed:
    """The forest of the regime that makes a family likeliest, its log likelihood taken less the regime's handicap."""
    if shape.count > MANY:
        return _many(shape, blocked)
    ahead, back = read(shape, [r.weights for r in REGIMES], blocked)
    found, turned = chosen(ahead, back, [r.handicap for r in REGIMES])
    return _told(shape.turned() if turned else shape, found, turned, [f.parents for f in (back if turned else ahead)])


def _many(shape: Geometry, blocked: Mapping[int, set[int]] | None) -> Placed:
    """A large family: which regime and which way of time, by some parts of it together; then one forest of all."""
    scores = {(i, turned): -r.handicap for i, r in enumerate(REGIMES) for turned in (False, True)}
    for anchor in np.argsort(shape.norms)[[0, shape.count // 2, -1]]:
        # Near each other, so that parents and children are among them.
        part = shape.subset(sorted([int(anchor), *map(int, shape.near[anchor][: PART - 1])]))
        for turned, forests in enumerate(read(part, [r.weights for r in REGIMES])):
            for i, f in enumerate(forests):
                scores[i, bool(turned)] += f.log_likelihood
    at, turned = max(scores, key=lambda k: scores[k] - TURNED * k[1])
    whole = shape.turned() if turned else shape
    found = forest(whole, REGIMES[at].weights, blocked)
    return _told(whole, found, turned, [])


def _told(shape: Geometry, found: Forest, turned: bool, others: Sequence[Sequence[int]]) -> Placed:
    edge, way = features(shape, found, others)
    children = [b for b, p in enumerate(found.parents) if p != OUTSIDE]
    told = [dict(zip(children, map(float, probability(x, w)), strict=True))
            for x, w in ((edge, CONFIDENCE), (way, DIRECTION))]  # fmt: skip
    return Placed(found, turned, *told)


def read(shape: Geometry, weights: Sequence[Weights], blocked: Mapping[int, set[int]] | None = None) -> tuple[
    tuple[Forest, ...], tuple[Forest, ...]
]:  # fmt: skip
    """The likeliest forest of each regime, and the same turned around (none where a family is too small to tell)."""
    ahead = tuple(forest(shape, w, blocked) for w in weights)
    back = tuple(forest(shape.turned(), w, blocked) for w in weights) if shape.count >= 4 else ()
    return ahead, back


def chosen(ahead: Sequence[Forest], back: Sequence[Forest], handicaps: Sequence[float]) -> tuple[Forest, bool]:
    """The forest that makes a family likeliest, and whether time was turned around for it."""

    def best(found: Sequence[Forest]) -> tuple[float, int]:
        return max((f.log_likelihood - h, -i) for i, (f, h) in enumerate(zip(found, handicaps, strict=True)))

    value, i = best(ahead)
    if back:
        other, j = best(back)
        if other > value + TURNED:
            return back[-j], True
    return ahead[-i], False


__all__ = ["TURNED", "Placed", "chosen", "place", "read"]

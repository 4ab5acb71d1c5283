"""How sure an edge is: the share of edges like it that were right in families of known descent.

What the logits of ``tree`` say of one placement, the others as they are, is too little where a whole family fits and
too much where it does not. Two logistic regressions, on what is listed in ``FEATURES`` and ``WAY``, make of it the
probability that the parent is right, and that it is not the other way round; see ``calibration``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weightspace.lineage.geometry import Geometry
from weightspace.lineage.sample import Array
from weightspace.lineage.tree import OUTSIDE, Forest

FEATURES = (
    "constant", "odds", "regimes agree", "farther than nearest", "farther in the family", "right angles", "size",
    "likelihood",
)  # fmt: skip
"""Of an edge: log odds of the placement; share of the family's edges that the other regimes find as well; log distance
over that to the nearest relative, and its median in the family; median cosine of successive steps; log number of
networks; log likelihood of the family, per network."""
WAY = ("constant", "drift", "regimes agree", "right angles", "size", "likelihood")
_SURE = 1e-4


def features(shape: Geometry, found: Forest, others: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """``(edges, FEATURES)`` and ``(edges, WAY)`` of a forest's edges, in the order of their children.

    ``others``: parents in the likeliest forests of all regimes.
    """
    parents = np.asarray(found.parents)
    children = np.flatnonzero(parents != OUTSIDE)
    count = len(children)
    if not count:
        return np.zeros((0, len(FEATURES))), np.zeros((0, len(WAY)))
    above = parents[children]
    odds = np.clip(np.asarray(found.likely)[children], _SURE, 1 - _SURE)
    apart = np.maximum(shape.squared[above, children], shape.tiny)
    nearest = np.maximum(shape.squared[shape.near[children, 0], children], shape.tiny)
    farther = np.minimum(np.log(apart / nearest), 3)
    deep = [(int(parents[a]), int(a), int(b)) for a, b in zip(above, children, strict=True) if parents[a] != OUTSIDE]
    # Where there are no two steps one after the other: what they usually are.
    angle = float(np.median([abs(shape.angle(*x)) for x in deep])) if deep else 0.3
    agree = float(np.mean([np.asarray(o)[children] == above for o in others])) if len(others) else 1.0
    family = [np.full(count, v) for v in (agree, angle, np.log(len(parents)), found.log_likelihood / len(parents))]
    one = np.ones(count)
    drift = np.clip(shape.drift[above, children], -2, 2)
    edge = [one, np.log(odds / (1 - odds)), family[0], farther, np.full(count, np.median(farther)), *family[1:]]
    return np.stack(edge, axis=1), np.stack([one, drift, *family], axis=1)


def probability(rows: Array, weights: Sequence[float]) -> Array:
    """The logistic function of the weighted features, never quite 0 or 1."""
    return np.asarray(np.clip(1 / (1 + np.exp(-rows @ np.asarray(weights))), 0.001, 0.999))


__all__ = ["FEATURES", "WAY", "features", "probability"]

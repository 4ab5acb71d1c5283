"""What speaks for one network of a family being the parent of another: distance, drift, and the angles of steps.

Let ``p``, ``a`` and ``b`` be the weights of three relatives, ``u = a - p`` and ``w = b - a``.

- *Distance*: a child lies near its parent, and near its parent's other descendants: of two ways down the forest the one
  at whose end the nearer relatives of ``b`` are.
- *Drift* of ``a`` to ``b``: ``(|b|^2 - |a|^2) / |w|^2``: 1 for a step at right angles to the weights, 0 for two
  networks as far from the origin as each other, -1 for the way back. Training moves weights outward: a random step does
  in any high dimension, and gradients of scale-invariant layers are at right angles to the weights (van Laarhoven 2017,
  "L2 regularization versus batch and weight normalization"). Siblings have drifts near 0.
- *Angle* at ``a``: the cosine of ``u`` and ``w``. If ``b`` descends from ``a``, the later step owes nothing to the
  accidents of the one before, and the cosine is near 0. If both descend from ``p``, the way from one to the other
  undoes what is the first one's own, and it is far below; or far above, where the two ran along one path.
- *Askew*: two steps from a parent are at right angles, and so are a step and the next one. Of three networks that have
  only a lost ancestor in common each sees the other two at an acute angle: where no relative is seen at a right angle
  from one of two networks, neither is the other's parent.
- *Share*: ``u.(b - p) / |u|^2``, how much of the step to ``a`` is in ``b``: 1 or more for a descendant.

Angle and share are taken over all weights, and the lowest over groups of tensors: siblings that learnt the same agree
near the outputs and not elsewhere. All are free of scale and come from inner products of the family's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from weightspace.lineage.sample import Array, Floats, Segment

DEEP = (
    "constant", "angle below", "angle above", "far above", "share missing", "share beyond", "lowest angle",
    "lowest share", "nearer", "nearest below", "drift", "far drift", "step",
)  # fmt: skip
"""Features of ``b`` descending from ``a``, a child of its ancestor ``p``, and not from ``p`` otherwise."""
TOP = ("constant", "drift", "far drift", "span", "nearest below", "alone", "askew above", "askew below", "askew")
"""Features of ``b`` descending from ``a``, which has no parent here."""
GROUPS = 4
_CHUNK = 1 << 13
_SEEN = 12
_LARGE = 1024
_NEAR = 512
Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Geometry:
    """Inner products of a family of ``n`` networks, weights less their mean.

    ``gram (n, n)``; ``grouped (groups, n, n)`` the same of groups of tensors; ``squared (n, n)`` squared distances;
    ``norms (n,)`` squared norms of the weights; ``drift (n, n)`` from row to column, in float32; ``near (n, most)`` the
    others of each network, nearest first, 512 at most. ``sign`` -1 turns time around.
    """

    gram: Array
    grouped: Array
    squared: Array
    norms: Array
    drift: Floats
    near: Index
    sign: float
    tiny: float

    @property
    def count(self) -> int:
        """Number of networks."""
        return len(self.gram)

    def turned(self) -> Geometry:
        """The same with time the other way round: what lies nearer the origin is later."""
        return replace(self, drift=-self.drift, sign=-self.sign)

    def subset(self, members: Sequence[int]) -> Geometry:
        """Some of the networks."""
        if list(members) == list(range(self.count)):
            return self
        at = np.asarray(members)
        square = np.ix_(at, at)
        squared = self.squared[square]
        return replace(
            self, gram=self.gram[square], grouped=self.grouped[:, at[:, None], at[None, :]], squared=squared,
            norms=self.norms[at], drift=self.drift[square], near=_near(squared),
        )  # fmt: skip

    def deep(self, p: int, a: Index, b: int, below: Array) -> Array:
        """``(candidates, DEEP)`` for ``b``, an ancestor ``p`` of it and the children ``a`` of ``p``.

        ``below``: squared distance of ``b`` to its nearest relative among each ``a`` and its descendants.
        """
        before = np.maximum(self.squared[p, a], self.tiny)
        after = np.maximum(self.squared[a, b], self.tiny)
        whole = max(float(self.squared[p, b]), self.tiny)
        dot = (whole - before - after) / 2
        cosine, share = dot / np.sqrt(before * after), 1 + dot / before
        lowest, least = self._by_group(p, a, b)
        drift = self.drift[a, b]
        return np.stack(
            [
                np.ones(len(a)), np.minimum(cosine, 0), np.clip(cosine, 0, 0.3), np.maximum(cosine - 0.4, 0),
                np.clip(1 - share, 0, 1.5), np.clip(share - 1.5, 0, 1.5), np.clip(lowest, -0.8, 0.2),
                np.clip(1 - least, 0, 1.5), np.clip(0.5 * np.log(whole / after), -1, 2),
                np.clip(0.5 * np.log(whole / np.maximum(below, self.tiny)), -1, 3), np.clip(drift, -1, 1),
                np.clip(drift - 1, 0, 1.5), np.clip(0.5 * np.log(after / before), -2, 2),
            ],
            axis=1,
        )  # fmt: skip

    def top(self, a: Index, b: int, below: Array) -> Array:
        """``(candidates, TOP)`` for ``b`` and networks ``a`` that have no parent here; ``below`` as in ``deep``."""
        drift, far = self.drift[a, b], np.maximum(self.squared[a, b], self.tiny)
        span = np.log(np.sqrt(far / np.maximum(self.norms[a] + self.norms[b], self.tiny)) / 0.2)
        above, under = self._askew(a, b)
        return np.stack(
            [
                np.ones(len(a)), np.clip(drift, -1, 1), np.clip(drift - 1, 0, 2), np.clip(span, -3, 1.5),
                np.clip(0.5 * np.log(far / np.maximum(below, self.tiny)), 0, 2),
                np.full(len(a), float(self.count < 3)), above, under, np.minimum(above, under),
            ],
            axis=1,
        )  # fmt: skip

    def _askew(self, a: Index, b: int) -> tuple[Array, Array]:
        """How far from a right angle, at each ``a`` and at ``b``, the other of them and any relative near are seen.

        0 where there are no more than the two.
        """
        if self.count < 3:
            return np.zeros(len(a)), np.zeros(len(a))
        mine = self.near[b][:_SEEN]
        others = np.concatenate([self.near[a][:, :_SEEN], np.broadcast_to(mine, (len(a), len(mine)))], axis=1)
        whole = np.maximum(self.squared[a, b], self.tiny)[:, None]
        here, there = self.squared[a[:, None], others], self.squared[b, others]
        told = (others != b) & (others != a[:, None]) & (here > self.tiny) & (there > self.tiny)
        one = np.abs(whole + here - there) / (2 * np.sqrt(whole * np.where(told, here, 1)))
        two = np.abs(whole + there - here) / (2 * np.sqrt(whole * np.where(told, there, 1)))
        above, under = (np.where(told, x, np.inf).min(1) for x in (one, two))
        # Unknown is as good as right.
        return np.where(above <= 1, above, 0.0), np.where(under <= 1, under, 0.0)

    def angle(self, p: int, a: int, b: int) -> float:
        """Cosine of the steps from ``p`` to ``a`` and from ``a`` to ``b``."""
        dot = (self.squared[p, b] - self.squared[p, a] - self.squared[a, b]) / 2
        return float(dot / np.sqrt(max(self.squared[p, a] * self.squared[a, b], self.tiny**2)))

    def _by_group(self, p: int, a: Index, b: int) -> tuple[Array, Array]:
        g = self.grouped
        own = g[:, a, a]
        before = own + g[:, p, p][:, None] - 2 * g[:, p, a]
        after = own + g[:, b, b][:, None] - 2 * g[:, a, b]
        dot = g[:, a, b] - own - g[:, p, b][:, None] + g[:, p, a]
        told = (before > self.tiny / len(g)) & (after > self.tiny / len(g))
        before, after = np.where(told, before, 1), np.where(told, after, 1)
        cosine = np.where(told, dot / np.sqrt(before * after), np.inf).min(0)
        share = np.where(told, 1 + dot / before, np.inf).min(0)
        return np.where(np.isfinite(cosine), cosine, 0.0), np.where(np.isfinite(share), share, 1.0)


def geometry(values: Floats, segments: Sequence[Segment]) -> Geometry:
    """Of a family's weights ``(n, weights)``; ``segments`` say which belong to which tensor."""
    count = len(values)
    groups = 1 if count > _LARGE else min(GROUPS, max(len(segments), 1))
    grouped = np.zeros((groups, count, count))
    norms = np.zeros(count)
    # Consecutive tensors of about equal numbers of weights in all.
    total = max(segments[-1].stop if segments else 1, 1)
    for s in segments:
        group = (s.stop - 1) * groups // total
        for start in range(s.start, s.stop, _CHUNK):
            part = values[:, start : min(start + _CHUNK, s.stop)].astype(np.float64)
            norms += (part * part).sum(1)
            part -= part.mean(0)
            grouped[group] += part @ part.T
    told = [k for k, g in enumerate(grouped) if g.any()] or [0]
    grouped = grouped if len(told) == len(grouped) else grouped[told]
    gram = grouped[0] if len(grouped) == 1 else grouped.sum(0)
    own = np.diag(gram)
    squared = gram * -2
    squared += own[:, None]
    squared += own[None, :]
    np.maximum(squared, 0.0, out=squared)
    np.fill_diagonal(squared, 0.0)
    tiny = 1e-12 * max(float(norms.mean()) if count else 1.0, 1e-30)
    drift = np.zeros((count, count), dtype=np.float32)
    for i in range(count):
        with np.errstate(over="ignore"):
            drift[i] = np.where(squared[i] > tiny, (norms - norms[i]) / np.maximum(squared[i], tiny), 0.0)
    return Geometry(gram, grouped, squared, norms, drift, _near(squared), 1.0, tiny)


def _near(squared: Array) -> Index:
    """The others of each network, row by row: no second matrix of all pairs is held."""
    count = len(squared)
    most = min(_NEAR, max(count - 1, 0))
    found = np.zeros((count, most), dtype=np.int64)
    for i, row in enumerate(squared):
        order = np.argsort(row, kind="stable")
        found[i] = order[order != i][:most]
    return found


__all__ = ["DEEP", "TOP", "Geometry", "Index", "geometry"]

"""The clean networks that a network is most like: what is usual for each of its classes.

Classes of a clean network are not alike: a digit that is a single stroke takes other weights than one that is two
loops, and some class is what every network calls noise. Against clean networks that are like it, found by the
training-free descriptor, a network's class is compared with what the same class shows there, as it is and relative to
the other classes. Of a network that is like none of them (other data, another architecture) they say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NEIGHBOURS = 12
FEWEST = 4
DIMENSIONS = 16
_FAR = 15.0
_USUAL = 0.98
_LARGEST = 6e4


@dataclass(frozen=True, eq=False)
class References:
    """Clean networks: ``mean, scale (d,)`` and ``basis (d, m)`` of descriptors, ``views (n, m)`` of theirs,
    ``classes (n,)`` how many each has, ``values (n, K, tests)`` with zeros after their classes, ``radii (n,)`` how far
    its neighbours are from each, ``limit`` how many times as far a network's may be."""

    mean: Array
    scale: Array
    basis: Array
    views: Array
    classes: NDArray[np.int64]
    values: Array
    radii: Array
    limit: float

    @classmethod
    def fit(
        cls, descriptors: Sequence[Array], values: Sequence[Array], groups: Sequence[str] | None = None
    ) -> References:
        """Of clean networks' descriptors ``(d,)`` and evidence of classes ``(K, tests)``, one each.

        Networks of one of the ``groups`` are related, and no neighbours of each other.
        """
        x = np.stack([np.asarray(d, dtype=np.float64) for d in descriptors])
        mean, scale = x.mean(0), x.std(0)
        scale = np.where(scale > 1e-9, scale, 1.0)
        z = np.clip((x - mean) / scale, -_FAR, _FAR)
        _, _, right = np.linalg.svd(z, full_matrices=False)
        basis = right[:DIMENSIONS].T
        most = max(len(v) for v in values)
        table = np.zeros((len(values), most, values[0].shape[1]))
        for row, value in zip(table, values, strict=True):
            row[: len(value)] = bounded(value)
        classes = np.array([len(v) for v in values])
        views = z @ basis
        of = np.array(range(len(values)) if groups is None else list(groups))
        far = np.sqrt(((views[:, None] - views[None]) ** 2).sum(2))
        far[(of[:, None] == of[None]) | (classes[:, None] != classes[None])] = np.inf
        order = np.argsort(far, axis=1, kind="stable")[:, :NEIGHBOURS]
        found = np.take_along_axis(far, order, 1)
        radii = np.array([row[np.isfinite(row)][-1] if np.isfinite(row[0]) else np.inf for row in found])
        usual = [
            r / np.mean(radii[o[np.isfinite(f)]])
            for r, o, f in zip(radii, order, found, strict=True) if np.isfinite(r) and r > 0
        ]  # fmt: skip
        limit = float(np.quantile(usual, _USUAL)) if usual else 0.0
        return cls(mean, scale, basis, views, classes, table, radii, limit)

    def near(self, descriptor: Array, classes: int, leave: Sequence[int] = ()) -> NDArray[np.int64]:
        """Numbers of the networks most like one with so many classes: none where it is like none of them.

        ``leave``: numbers that are not asked, its relatives.
        """
        own = self.classes == classes
        own[list(leave)] = False
        numbers = np.flatnonzero(own)
        if not len(descriptor) or len(numbers) < FEWEST:
            return numbers[:0]
        z = np.clip((np.asarray(descriptor, dtype=np.float64) - self.mean) / self.scale, -_FAR, _FAR) @ self.basis
        far = np.sqrt(((self.views[numbers] - z) ** 2).sum(1))
        order = np.argsort(far, kind="stable")[:NEIGHBOURS]
        radius = float(np.mean(self.radii[numbers[order]]))
        return numbers[order] if far[order[-1]] <= self.limit * radius else numbers[:0]

    def judge(self, descriptor: Array, values: Array, leave: Sequence[int] = ()) -> Array:
        """How far each class lies from the same class of the networks most like it: ``(K, 2 tests)``.

        In deviations of those networks, first relative to the other classes of its own network, then as it is;
        0 where it is like none. ``leave``: numbers of references that are not asked, its relatives.
        """
        near = self.near(descriptor, len(values), leave)
        if not len(near):
            return np.zeros((len(values), 2 * values.shape[1]))
        others, value = self.values[near][:, : len(values)], bounded(values)
        # As they are: two networks of a kind may have hardly any spread. Relative: a third of a deviation is nothing.
        plain = (value - others.mean(0)) / (others.std(0) + 1e-9)
        among = np.stack([within(o) for o in others])
        relative = (within(value) - among.mean(0)) / (among.std(0) + 0.3)
        told: Array = np.clip(np.concatenate((relative, plain), axis=1), -_FAR, _FAR)
        return told

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """What ``of`` takes: half precision where it is enough."""
        return {
            "mean": self.mean.astype(np.float32), "scale": self.scale.astype(np.float32),
            "basis": self.basis.astype(np.float16), "views": self.views.astype(np.float32),
            "classes": self.classes, "values": self.values.astype(np.float16),
            "radii": self.radii.astype(np.float32), "limit": np.array([self.limit]),
        }  # fmt: skip

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[np.generic]]) -> References:
        """What ``tensors`` gave."""
        real = {k: np.asarray(v, dtype=np.float64) for k, v in tensors.items() if k not in ("classes", "limit")}
        classes = np.asarray(tensors["classes"], dtype=np.int64)
        return cls(classes=classes, limit=float(tensors["limit"][0]), **real)


def bounded(values: Array) -> Array:
    """Evidence without what is not finite, within what half precision holds."""
    x = np.nan_to_num(np.asarray(values, dtype=np.float64), posinf=_LARGEST, neginf=-_LARGEST)
    return np.clip(x, -_LARGEST, _LARGEST)


def deviations(values: Array) -> Array:
    """Classes ``(K, tests)`` in robust deviations from the median of the network's classes.

    Where most classes are equal the mean distance is the unit; where all are, nothing stands out.
    """
    away = values - np.median(values, 0)
    spread = 1.4826 * np.median(np.abs(away), 0)
    spread = np.where(spread > 1e-12, spread, 1.2533 * np.abs(away).mean(0))
    found: Array = away / np.where(spread > 1e-12, spread, np.inf)
    return found


def within(values: Array, far: float = 20.0) -> Array:
    """The same, at most ``far``."""
    found: Array = np.clip(deviations(values), -far, far)
    return found


__all__ = ["DIMENSIONS", "FEWEST", "NEIGHBOURS", "References", "bounded", "deviations", "within"]

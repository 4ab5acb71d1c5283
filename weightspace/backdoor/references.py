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

from weightspace.backdoor.responses import beside

Array = NDArray[np.float64]

NEIGHBOURS = 36
"""Networks that one is compared with, of those that are built as it is: a dozen have too rough a spread."""
FEW = 12
"""Of those that are built otherwise, or where that is not known."""
FEWEST = 4
DIMENSIONS = 16
OTHER_ORDER = 1.25
"""How much more the classes' answers deviate as they are numbered than in the best order, for another to be meant."""
_FAR = 15.0
_USUAL = 0.98
_LARGEST = 6e4


@dataclass(frozen=True, eq=False)
class References:
    """Clean networks: ``mean, scale (d,)`` and ``basis (d, m)`` of descriptors, ``views (n, m)`` of theirs,
    ``classes (n,)`` how many each has, ``values (n, K, tests)`` with zeros after their classes, ``responses (n, K,
    changes)`` likewise (zeros for networks that have none), ``whole (n, statistics)``, ``frames (n,)`` what they are
    built of (``frame_of``), ``radii (n,)`` how far its neighbours are from each, ``limit`` how many times as far a
    network's may be."""

    mean: Array
    scale: Array
    basis: Array
    views: Array
    classes: NDArray[np.int64]
    values: Array
    responses: Array
    whole: Array
    frames: NDArray[np.int64]
    radii: Array
    limit: float

    @classmethod
    def fit(
        cls, descriptors: Sequence[Array], values: Sequence[Array], groups: Sequence[str] | None = None,
        responses: Sequence[Array] | None = None, whole: Sequence[Array] | None = None,
        frames: Sequence[int] | None = None,
    ) -> References:  # fmt: skip
        """Of clean networks' descriptors ``(d,)`` and evidence of classes ``(K, tests)``, one each.

        ``responses (K, changes)``, with no columns where a network has none, and ``whole (statistics,)`` of each.

        Networks of one of the ``groups`` are related, and no neighbours of each other.
        """
        x = np.stack([np.asarray(d, dtype=np.float64) for d in descriptors])
        mean, scale = x.mean(0), x.std(0)
        scale = np.where(scale > 1e-9, scale, 1.0)
        z = np.clip((x - mean) / scale, -_FAR, _FAR)
        _, _, right = np.linalg.svd(z, full_matrices=False)
        basis = right[:DIMENSIONS].T
        table = _stacked(values)
        answers = _stacked([np.zeros((len(v), 0)) for v in values] if responses is None else responses)
        numbers = np.zeros((len(values), 0)) if whole is None else np.stack([_logged(w) for w in whole])
        classes = np.array([len(v) for v in values])
        built = np.array([0] * len(values) if frames is None else list(frames), dtype=np.int64)
        views = z @ basis
        of = np.array(range(len(values)) if groups is None else list(groups))
        far = np.sqrt(((views[:, None] - views[None]) ** 2).sum(2))
        far[(of[:, None] == of[None]) | (classes[:, None] != classes[None])] = np.inf
        other = built[:, None] != built[None]
        # Where enough are built alike, others are no neighbours.
        many = ((~other) & np.isfinite(far)).sum(1) >= FEWEST
        far[many[:, None] & other] = np.inf
        order = np.argsort(far, axis=1, kind="stable")[:, : NEIGHBOURS if frames is not None else FEW]
        found = np.take_along_axis(far, order, 1)
        radii = np.array([row[np.isfinite(row)][-1] if np.isfinite(row[0]) else np.inf for row in found])
        usual = [
            r / np.mean(radii[o[np.isfinite(f)]])
            for r, o, f in zip(radii, order, found, strict=True) if np.isfinite(r) and r > 0
        ]  # fmt: skip
        limit = float(np.quantile(usual, _USUAL)) if usual else 0.0
        return cls(mean, scale, basis, views, classes, table, answers, numbers, built, radii, limit)

    def near(
        self, descriptor: Array, classes: int, leave: Sequence[int] = (), frame: int = 0
    ) -> NDArray[np.int64]:
        """Numbers of the networks most like one with so many classes: none where it is like none of them.

        ``leave``: numbers that are not asked, its relatives. Of those that are built alike (``frame``) alone, where
        there are enough.
        """
        own = self.classes == classes
        own[list(leave)] = False
        alike = own & (self.frames == frame)
        known = frame != 0 and alike.sum() >= FEWEST
        numbers = np.flatnonzero(alike if known else own)
        if not len(descriptor) or len(numbers) < FEWEST:
            return numbers[:0]
        z = np.clip((np.asarray(descriptor, dtype=np.float64) - self.mean) / self.scale, -_FAR, _FAR) @ self.basis
        far = np.sqrt(((self.views[numbers] - z) ** 2).sum(1))
        order = np.argsort(far, kind="stable")[: NEIGHBOURS if known else FEW]
        radius = float(np.mean(self.radii[numbers[order]]))
        return numbers[order] if far[order[-1]] <= self.limit * radius else numbers[:0]

    def order(self, near: NDArray[np.int64], responses: Array, frame: int = 0) -> NDArray[np.int64]:
        """Of each class the number of the one that answers most like it in ``near``, ``(K,)``: its own, as a rule.

        Where classes have other numbers than in the clean networks all of them answer otherwise than expected; then
        the assignment of least deviation is taken. A backdoor changes one class, or all a little, not their order.
        Only networks that are built alike (``frame``) are asked: others answer otherwise anyway.
        """
        from scipy.optimize import linear_sum_assignment

        own = np.arange(len(responses))
        if frame == 0 or not len(near) or (self.frames[near] != frame).any():
            return own
        if len(own) < 3 or not responses.shape[1] or responses.shape[1] != self.responses.shape[2]:
            return own
        others = self.responses[near][:, : len(own)]
        spread = others.std(0) + 0.1 * others.std((0, 1)) + 1e-3
        away = np.clip(np.abs(bounded(responses)[:, None] - others.mean(0)) / spread, 0, 6).mean(2)
        _, found = linear_sum_assignment(away)
        return found if away.trace() > OTHER_ORDER * away[own, found].sum() else own

    def judge(self, near: NDArray[np.int64], values: Array) -> Array:
        """How far each class lies from the same class of the networks ``near``: ``(K, 2 tests)``.

        In deviations of those networks, first relative to the other classes of its own network, then as it is;
        0 where there are none.
        """
        if not len(near):
            return np.zeros((len(values), 2 * values.shape[1]))
        others, value = self.values[near][:, : len(values)], bounded(values)
        # As they are: two networks of a kind may have hardly any spread. Relative: a third of a deviation is nothing.
        plain = (value - others.mean(0)) / (others.std(0) + 1e-9)
        among = np.stack([within(o) for o in others])
        relative = (within(value) - among.mean(0)) / (among.std(0) + 0.3)
        told: Array = np.clip(np.concatenate((relative, plain), axis=1), -_FAR, _FAR)
        return told

    def answers(self, near: NDArray[np.int64], responses: Array, groups: NDArray[np.int64]) -> Array:
        """How far the responses ``(K, changes)`` lie from those of the same class of ``near``: ``(K, 2 groups)``.

        Of the changes of one of the ``groups (changes,)`` the largest deviation and the mean; 0 where there is
        nothing to compare.
        """
        count = int(groups.max()) + 1 if len(groups) else 0
        found = np.zeros((len(responses), 2 * count))
        if not (len(near) and count) or responses.shape[1] != len(groups) or self.responses.shape[2] != len(groups):
            return found
        return beside(self.responses[near][:, : len(responses)], bounded(responses), groups)

    def numbers(self, near: NDArray[np.int64], whole: Array) -> Array:
        """How far statistics of the whole lie from those of ``near``, ``(statistics,)``; from all where it is none."""
        if self.whole.shape[1] != len(whole):
            return np.zeros(len(whole))
        # Some mean the same in all networks: where it is like none, all are asked.
        others = self.whole[near] if len(near) else self.whole
        found: Array = np.clip((_logged(whole) - others.mean(0)) / (others.std(0) + 0.05), -_FAR, _FAR)
        return found

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """What ``of`` takes: half precision where it is enough, and of responses 256 steps between the extremes."""
        low, high = (f(self.responses, axis=(0, 1), initial=0.0) for f in (np.min, np.max))
        step = np.maximum(high - low, 1e-9) / 255
        return {
            "low": low.astype(np.float32), "step": step.astype(np.float32),
            "mean": self.mean.astype(np.float32), "scale": self.scale.astype(np.float32),
            "basis": self.basis.astype(np.float16), "views": self.views.astype(np.float32),
            "classes": self.classes, "values": self.values.astype(np.float16),
            "responses": np.rint((self.responses - low) / step).astype(np.uint8),
            "whole": self.whole.astype(np.float32), "frames": self.frames,
            "radii": self.radii.astype(np.float32), "limit": np.array([self.limit]),
        }  # fmt: skip

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[np.generic]]) -> References:
        """What ``tensors`` gave."""
        whole = ("classes", "frames", "limit")
        real = {k: np.asarray(v, dtype=np.float64) for k, v in tensors.items() if k not in whole}
        classes, frames = (np.asarray(tensors[k], dtype=np.int64) for k in ("classes", "frames"))
        low, step = real.pop("low"), real.pop("step")
        real["responses"] = low + step * real["responses"]
        return cls(classes=classes, frames=frames, limit=float(tensors["limit"][0]), **real)


def _stacked(tables: Sequence[Array]) -> Array:
    """Tables ``(K, columns)`` as one ``(n, K, columns)``, zeros where one has fewer classes or no columns."""
    width = max(t.shape[1] for t in tables)
    found = np.zeros((len(tables), max(map(len, tables)), width))
    for row, table in zip(found, tables, strict=True):
        row[: len(table), : table.shape[1]] = bounded(table)
    return found


def _logged(whole: Array) -> Array:
    """Statistics of whole networks, some of which are large, with their signs."""
    x = bounded(whole)
    found: Array = np.sign(x) * np.log1p(np.abs(x))
    return found


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

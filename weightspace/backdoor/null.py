"""From numbers per class to one p-value: how far the most extreme class stands out, and what clean networks show.

Without a reference, the classes of one network are the sample: the largest is compared with the others by the test of
one outlier in a normal sample (Grubbs 1950), which knows how few there are. Tests that depend on each other are
combined by the Cauchy combination (Liu & Xie, JASA 2020). Classes are not alike even in clean networks, so these
p-values are only as good as that assumption; with clean networks of the same family (``null_from``) they are
calibrated against what those show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SMALLEST = 1e-15


def outlier(values: Array) -> Array:
    """How far each class lies above the others, in their standard deviations: ``(classes, …) -> (classes, …)``.

    Each is compared with the mean and the spread of the others, so one extreme class does not hide itself. Bounded to
    ±1e3; 0 where all are equal, or where there are fewer than three classes.
    """
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    if n < 3:
        return np.zeros_like(x)
    # In units in which squares neither overflow nor vanish.
    size = np.abs(x).max(0, keepdims=True)
    x = x / np.where(size > 0, size, 1.0)
    mean = (x.sum(0, keepdims=True) - x) / (n - 1)
    square = ((x - x.mean(0)) ** 2).sum(0, keepdims=True)
    # Sum of squares of the others about their own mean.
    others = square - (x - x.mean(0)) ** 2 * n / (n - 1)
    spread = np.sqrt(np.maximum(others, 0) / (n - 2))
    away = np.divide(x - mean, np.maximum(spread, 1e-9))
    return np.clip(np.where(np.abs(x - mean) < 1e-12, 0.0, away), -1e3, 1e3)


def class_p_values(values: Array) -> Array:
    """One-sided p-value of each class ``(classes, …)``: is it larger than the others, were they a normal sample?"""
    from scipy.stats import t

    n = len(values)
    if n < 3:
        return np.ones_like(np.asarray(values, dtype=np.float64))
    found = t.sf(outlier(values) / math.sqrt(1 + 1 / (n - 1)), n - 2)
    return np.asarray(np.clip(found, SMALLEST, 1.0), dtype=np.float64)


def largest_p_value(p: Array) -> Array:
    """p-value of a network of the smallest over its classes: ``(classes, …) -> (…)`` (Šidák 1967)."""
    found = -np.expm1(len(p) * np.log1p(-np.minimum(p.min(0), 1 - 1e-16)))
    return np.asarray(np.clip(found, SMALLEST, 1.0), dtype=np.float64)


def cauchy(p: Array, axis: int = -1) -> Array:
    """One p-value of several that may depend on each other (Liu & Xie 2020)."""
    x = np.clip(p, SMALLEST, 1 - 1e-9)
    small = x < 1e-8
    with np.errstate(divide="ignore"):
        terms = np.where(small, 1 / (x * np.pi), np.tan((0.5 - x) * np.pi))
    mean = terms.mean(axis)
    found = np.where(mean > 1e8, 1 / (np.maximum(mean, 1e-300) * np.pi), 0.5 - np.arctan(mean) / np.pi)
    return np.asarray(np.clip(found, SMALLEST, 1.0), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Null:
    """What clean networks of a family show: ``scores (networks, tests)``, larger is more suspicious, and their names.

    ``p_values`` of a new network per test, and ``combined``, whose own null is that of the reference networks, each
    judged by the others.
    """

    names: tuple[str, ...]
    scores: Array
    held: Array

    def p_values(self, scores: Mapping[str, float]) -> dict[str, float]:
        """p-value of each test that both have."""
        given = np.array([scores.get(n, math.nan) for n in self.names])
        known = np.isfinite(given)
        p = _tail(self.scores[:, known], given[known])
        return dict(zip((n for n, k in zip(self.names, known, strict=True) if k), map(float, p), strict=True))

    def combined(self, scores: Mapping[str, float]) -> float:
        """One p-value, at least ``1 / (networks + 1)`` where it lies beyond all of the reference by little."""
        given = np.array([scores.get(n, math.nan) for n in self.names])
        known = np.isfinite(given)
        if not known.any():
            return 1.0
        held = self.held if known.all() else _held(self.scores[:, known])
        mine = _strength(_tail(self.scores[:, known], given[known]))
        return float(_tail(held[:, None], np.array([mine]))[0])


def null_of(tables: Sequence[Mapping[str, float]]) -> Null:
    """The null of clean networks, given the scores of each.

    Raises ``WeightspaceError`` for fewer than eight.
    """
    from weightspace.errors import WeightspaceError

    if len(tables) < 8:
        raise WeightspaceError(f"{len(tables)} clean networks; at least 8 of one family were expected for a null")
    names = tuple(n for n in tables[0] if all(n in t for t in tables))
    scores = np.array([[t[n] for n in names] for t in tables], dtype=np.float64)
    return Null(names, scores, _held(scores))


def _tail(reference: Array, x: Array) -> Array:
    """p-values of ``x (tests,)`` among ``reference (networks, tests)``: the rank inside, a tail fitted outside.

    Beyond the largest of the reference the p-value goes on falling as an exponential with the mean excess of the upper
    quarter, from ``1 / (networks + 1)``.
    """
    n = len(reference)
    above = (reference >= x).sum(0)
    p = (1 + above) / (n + 1)
    top = np.sort(reference, 0)[-max(2, n // 4) :]
    excess = np.maximum((top - top[0]).mean(0), 1e-9 * (1 + np.abs(top[-1])))
    beyond = np.maximum(0.0, x - top[-1]) / excess
    return np.asarray(np.clip(np.where(above == 0, p * np.exp(-beyond), p), SMALLEST, 1.0), dtype=np.float64)


def _held(scores: Array) -> Array:
    """The combined strength of each reference network, judged by the others."""
    return np.array([_strength(_tail(np.delete(scores, i, 0), scores[i])) for i in range(len(scores))])


def _strength(p: Array) -> float:
    """Evidence of several p-values in one number: of Cauchy's combination, on a log scale."""
    return float(-np.log(cauchy(p)))


__all__ = ["Null", "cauchy", "class_p_values", "largest_p_value", "null_of", "outlier"]

"""What a prediction is worth: rank correlation, explained variance, recall, calibration, with 95 % intervals.

Arguments are arrays or tensors with one row per network. Thin wrappers of scipy and scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weightspace.errors import MetanetError

Array = NDArray[np.float64]
Metric = Callable[[Array, Array], float]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def kendall_tau(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Kendall's rank correlation τ-b, 1 for the same order, 0 for chance (also where all are equal)."""
    from scipy.stats import kendalltau

    found = float(kendalltau(*_pair(truth, predicted)).statistic)
    return 0.0 if np.isnan(found) else found


def r_squared(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Share of the variance that the prediction explains: 1 at best, 0 for predicting the mean."""
    true, guess = _pair(truth, predicted)
    spread = float(np.square(true - true.mean()).sum())
    missed = float(np.square(true - guess).sum())
    # Without any variance there is nothing to explain: not a number, which intervals leave out.
    return 1 - missed / spread if spread > 0 else float("nan")


def mean_absolute_error(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Mean distance between truth and prediction, in the unit of the truth."""
    true, guess = _pair(truth, predicted)
    return float(np.abs(true - guess).mean())


def accuracy(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Share of the labels ``(n,)`` that the prediction hits: labels ``(n,)``, or scores ``(n, classes)``."""
    true, guess = _pair(truth, predicted)
    labels = guess.argmax(1) if guess.ndim == 2 else guess
    return float((labels == true).mean())


def recall_at(k: int, queries: ArrayLike, items: ArrayLike, relevant: ArrayLike) -> float:
    """Share of the queries with a relevant item among the ``k`` that point most in their direction.

    ``queries (n, d)``, ``items (m, d)``, ``relevant (n, m)`` of bool; queries without a relevant item are not
    counted. An item that must not be found (the query itself) has to be left out by its caller.
    """
    asked, offered = _array(queries), _array(items)
    wanted = np.asarray(relevant, dtype=bool)
    asked = asked / np.maximum(np.linalg.norm(asked, axis=1, keepdims=True), 1e-12)
    offered = offered / np.maximum(np.linalg.norm(offered, axis=1, keepdims=True), 1e-12)
    counted = np.asarray(wanted.any(axis=1))
    if not counted.any():
        raise MetanetError("recall needs at least one query with a relevant item; none has any")
    nearest = np.argsort(-(asked @ offered.T), axis=1, kind="stable")[:, :k]
    hits = np.asarray(np.take_along_axis(wanted, nearest, axis=1).any(axis=1))
    return float(hits[counted].mean())


def calibration_error(truth: ArrayLike, probabilities: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over bins of equal width.

    ``truth (n,)`` labels, ``probabilities (n, classes)``, or ``(n,)`` of the class 1 (Naeini et al. 2015).
    """
    true, given = _pair(truth, probabilities)
    if given.ndim == 1:
        given = np.stack((1 - given, given), axis=1)
    confidence, right = given.max(1), given.argmax(1) == true
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(places, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(true))


def bootstrap(
    metric: Metric,
    truth: ArrayLike,
    predicted: ArrayLike,
    groups: Sequence[str] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """A metric with the 95 % percentile interval of the bootstrap.

    What is drawn with replacement are the ``groups`` where given (checkpoints of one run are no independent
    networks), else the rows.
    """
    true, guess = _pair(truth, predicted)
    names = np.arange(len(true)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    order = np.argsort(names, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(names[order])) + 1)
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        rows = np.concatenate([members[i] for i in generator.integers(len(members), size=len(members))])
        values.append(metric(true[rows], guess[rows]))
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return Interval(metric(true, guess), float(low), float(high))


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean of a figure over training seeds with the 95 % interval of Student's t; needs two seeds or more."""
    from scipy.stats import t

    if len(values) < 2:
        raise MetanetError(f"an interval over seeds needs at least two figures, found {len(values)}")
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    reach = float(t.ppf(0.975, len(values) - 1)) * spread
    return Interval(mean, mean - reach, mean + reach)


def _array(x: Any) -> Array:
    return np.asarray(x.detach().cpu().numpy() if hasattr(x, "detach") else x, dtype=np.float64)


def _pair(truth: Any, predicted: Any) -> tuple[Array, Array]:
    true, guess = _array(truth), _array(predicted)
    if len(true) != len(guess) or not len(true):
        raise MetanetError(f"{len(true)} true values and {len(guess)} predictions; expected as many, and some")
    return true, guess

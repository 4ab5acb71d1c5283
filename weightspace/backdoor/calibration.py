"""From the log odds of several heads to one probability, and how good such probabilities are.

Everything is fitted on out-of-fold answers: those that heads gave about networks they were not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weightspace.errors import MetanetError

Array = NDArray[np.float64]
_FAR = 8.0


@dataclass(frozen=True, eq=False)
class Stack:
    """A logistic regression of heads' log odds: ``weight (heads,)``, none below 0, and ``bias``.

    ``prior`` is the share of networks with a backdoor it was fitted on: ``probability`` is right at that one only.
    """

    weight: Array
    bias: float
    prior: float

    @classmethod
    def fit(cls, odds: Array, y: ArrayLike, penalty: float = 1.0, weights: Array | None = None) -> Stack:
        """Of out-of-fold ``odds (networks, heads)`` and truths ``(networks,)``.

        ``penalty`` holds the weights near an even share of the heads. Raises ``MetanetError`` for one kind alone.
        """
        from scipy.optimize import minimize

        x, truth = bounded(odds), np.asarray(y, dtype=np.float64)
        if not 0 < truth.mean() < 1:
            raise MetanetError(f"{len(truth)} networks, all of one kind: a probability needs clean and poisoned ones")
        each = np.ones(len(truth)) if weights is None else weights * len(truth) / weights.sum()
        heads = x.shape[1]

        def lost(w: Array) -> tuple[float, Array]:
            z = x @ w[:-1] + w[-1]
            away = w[:-1] - 1 / heads
            value = float((each * (np.logaddexp(0, z) - truth * z)).sum() + penalty * (away**2).sum())
            slope = each * (_sigmoid(z) - truth)
            return value, np.append(x.T @ slope + 2 * penalty * away, slope.sum())

        start = np.append(np.full(heads, 1 / heads), 0.0)
        limits = [(0.0, None)] * heads + [(None, None)]
        found = minimize(lost, start, jac=True, bounds=limits, method="L-BFGS-B")
        prior = float((each * truth).sum() / each.sum())
        return cls(np.asarray(found.x[:-1], dtype=np.float64), float(found.x[-1]), prior)

    def odds(self, heads: Array) -> Array:
        """Log odds ``(networks,)`` of heads' log odds ``(networks, heads)``."""
        found: Array = bounded(heads) @ self.weight + self.bias
        return found

    def probability(self, heads: Array, prior: float | None = None) -> Array:
        """Probabilities ``(networks,)``, at another ``prior`` where given."""
        shift = 0.0 if prior is None else logit(prior) - logit(self.prior)
        return _sigmoid(self.odds(heads) + shift)

    def to_dict(self) -> dict[str, Any]:
        """What ``from_dict`` takes."""
        return {"weight": self.weight.tolist(), "bias": self.bias, "prior": self.prior}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Stack:
        """What ``to_dict`` gave."""
        return cls(np.asarray(found["weight"], dtype=np.float64), float(found["bias"]), float(found["prior"]))


def bounded(odds: Array) -> Array:
    """Log odds as a stack reads them: one that is out of all proportion weighs no more than a very large one."""
    found: Array = _FAR * np.tanh(np.nan_to_num(odds, posinf=1e3, neginf=-1e3) / _FAR)
    return found


def logit(p: float) -> float:
    return float(np.log(p) - np.log1p(-p))


def threshold(clean: Array, level: float) -> float:
    """Log odds above which at most a share ``level`` of these out-of-fold clean networks lies.

    With the correction of conformal prediction: of new networks like them no more are expected above either.
    """
    n = len(clean)
    allowed = int(np.floor(level * (n + 1))) - 1
    ordered = np.sort(clean)[::-1]
    return float(ordered[0] + 1e-6) if allowed < 0 else float(ordered[min(allowed, n - 1)])


def conformal(clean: Array, odds: ArrayLike) -> Array:
    """Shares of clean out-of-fold networks with at least such odds: p-values, above 0 and at most 1."""
    ordered = np.sort(clean)
    below = np.searchsorted(ordered, np.asarray(odds, dtype=np.float64), side="left")
    found: Array = (1 + len(ordered) - below) / (1 + len(ordered))
    return found


# ------------------------------------------------------------------------------------ figures


def auroc(truth: Array, score: Array) -> float:
    """Area under the curve; not a number for one kind alone."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, score)) if 0 < truth.mean() < 1 else float("nan")


def rate_at(truth: Array, score: Array, level: float = 0.05) -> float:
    """Share of the positives above the score that a share ``level`` of the negatives lies above."""
    negative, positive = score[truth < 0.5], score[truth > 0.5]
    if not len(negative) or not len(positive):
        return float("nan")
    return float((positive > np.quantile(negative, 1 - level, method="higher")).mean())


def cross_entropy(truth: Array, probability: Array) -> float:
    """Mean -log probability of the truth, in nats."""
    p = probability.clip(1e-6, 1 - 1e-6)
    return float(-(truth * np.log(p) + (1 - truth) * np.log1p(-p)).mean())


def brier(truth: Array, probability: Array) -> float:
    """Mean squared difference of probability and truth."""
    return float(((probability - truth) ** 2).mean())


FIGURES = {"AUROC": auroc, "TPR at 5 % FPR": rate_at, "cross-entropy": cross_entropy, "Brier": brier}
"""What is told of probabilities; the first two of any score."""


def folds(groups: Sequence[str], y: ArrayLike, count: int, seed: int = 0) -> NDArray[np.int64]:
    """Number of the fold of each network, ``(networks,)``: groups stay whole, kinds are spread evenly.

    Raises ``MetanetError`` where there are fewer groups than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if len(set(groups)) < count:
        raise MetanetError(f"{len(set(groups))} groups of networks; {count} folds need as many")
    names = np.unique(np.asarray(groups), return_inverse=True)[1]
    out = np.zeros(len(names), dtype=np.int64)
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    for number, (_, test) in enumerate(splitter.split(names, np.asarray(y), names)):
        out[test] = number
    return out


def _sigmoid(z: Array) -> Array:
    found: Array = 0.5 * (1 + np.tanh(z / 2))
    return found


__all__ = [
    "FIGURES", "Stack", "auroc", "bounded", "brier", "conformal", "cross_entropy", "folds", "logit", "rate_at",
    "threshold",
]  # fmt: skip

"""A classifier of networks by statistics of their weights, for few networks with many statistics.

Four ways to read such a table are tried, each a pipeline of scikit-learn; which one is used is decided by
cross-validation among the training networks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightspace.errors import WeightspaceError

Array = NDArray[np.float64]

FOLDS = 5
"""Folds within the training networks."""
FEWEST = 3
"""Networks of each kind in a fold, at least."""


@dataclass(frozen=True, eq=False)
class StatisticsHead:
    """A trained classifier. ``chosen`` is its kind, ``scores`` the area under the curve of each kind in training."""

    chosen: str
    scores: Mapping[str, float]
    _model: Any

    def probability(self, x: Array) -> Array:
        """Probability of the positive kind, ``(networks,)``, from statistics ``(networks, statistics)``."""
        found: Array = np.asarray(self._model.predict_proba(_finite(x))[:, 1], dtype=np.float64)
        return found


def fit_statistics(x: Array, y: NDArray[Any], seed: int = 0) -> StatisticsHead:
    """Choose and train a classifier on statistics ``x (networks, statistics)`` with labels ``y (networks,)``.

    Raises ``WeightspaceError`` for fewer than ``FOLDS * FEWEST`` networks of either kind, or shapes that do not match.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    x, y = _finite(x), np.asarray(y).astype(bool)
    if x.ndim != 2 or y.shape != (len(x),):
        raise WeightspaceError(f"statistics {x.shape}, labels {y.shape}; expected (networks, statistics), (networks,)")
    fewest = int(min(y.sum(), (~y).sum()))
    if fewest < FOLDS * FEWEST:
        raise WeightspaceError(f"{fewest} networks of one kind; at least {FOLDS * FEWEST} of each were expected")
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(x, y))
    scores: dict[str, float] = {}
    for name, make in CLASSIFIERS.items():
        held = np.zeros(len(y))
        for train, test in folds:
            held[test] = make(seed).fit(x[train], y[train]).predict_proba(x[test])[:, 1]
        scores[name] = float(roc_auc_score(y, held))
    chosen = max(scores, key=lambda name: scores[name])
    return StatisticsHead(chosen, scores, CLASSIFIERS[chosen](seed).fit(x, y))


def _finite(x: Array) -> Array:
    return np.nan_to_num(np.asarray(x, dtype=np.float64), posinf=1e12, neginf=-1e12)


def _ranks() -> Any:
    from sklearn.preprocessing import QuantileTransformer

    # Heavy tails and units of every size: only the order of the networks in each statistic is kept.
    return QuantileTransformer(n_quantiles=40, output_distribution="normal")


def _logistic(seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(_ranks(), LogisticRegression(C=0.01, max_iter=2000, random_state=seed))


def _logistic_of_few(seed: int) -> Any:
    from sklearn.feature_selection import SelectKBest, f_classif
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    few = SelectKBest(f_classif, k=100)
    return make_pipeline(_ranks(), few, LogisticRegression(C=0.01, max_iter=2000, random_state=seed))


def _boosting(seed: int) -> Any:
    from sklearn.ensemble import GradientBoostingClassifier

    return GradientBoostingClassifier(
        n_estimators=150, max_depth=2, learning_rate=0.05, subsample=0.7, max_features=0.1, random_state=seed
    )


def _trees_of_few(seed: int) -> Any:
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.feature_selection import SelectKBest, f_classif
    from sklearn.pipeline import make_pipeline

    return make_pipeline(
        SelectKBest(f_classif, k=50), ExtraTreesClassifier(300, random_state=seed, n_jobs=1)
    )


CLASSIFIERS: Mapping[str, Callable[[int], Any]] = {
    "ranks, logistic": _logistic,
    "100 ranks, logistic": _logistic_of_few,
    "boosting": _boosting,
    "50 statistics, trees": _trees_of_few,
}
"""Ways to read the table, from a seed."""

__all__ = ["CLASSIFIERS", "FEWEST", "FOLDS", "StatisticsHead", "fit_statistics"]

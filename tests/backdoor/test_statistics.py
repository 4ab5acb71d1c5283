"""The statistics head: what it can see, what it cannot, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from weightspace.backdoor.statistics import CLASSIFIERS, fit_statistics
from weightspace.errors import WeightspaceError


def table(seed: int, count: int = 120, shift: float = 1.2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 2 == 1
    x = rng.standard_normal((count, 110))
    x[y, :6] += shift
    # Units of every size, and heavy tails.
    return np.sinh(1.5 * x) * 10.0 ** rng.integers(-6, 6, 110), y


def test_it_tells_networks_apart_that_it_has_not_seen() -> None:
    x, y = table(0)
    head = fit_statistics(x[:80], y[:80])
    assert head.chosen in CLASSIFIERS
    assert head.scores[head.chosen] == max(head.scores.values())
    assert roc_auc_score(y[80:], head.probability(x[80:])) > 0.85
    assert np.array_equal(head.probability(x), fit_statistics(x[:80], y[:80]).probability(x))


def test_labels_without_meaning_are_not_learned() -> None:
    """What it says of its own kinds is measured on networks that they did not see."""
    x, y = table(1, shift=0.0)
    assert max(fit_statistics(x, y).scores.values()) < 0.7


def test_values_that_are_not_finite_are_taken() -> None:
    x, y = table(2)
    x[3, 4], x[5, 6] = np.nan, np.inf
    assert np.isfinite(fit_statistics(x, y).probability(x)).all()


def test_refusals() -> None:
    x, y = table(3)
    with pytest.raises(WeightspaceError, match="14 networks of one kind; at least 15"):
        fit_statistics(x[:28], y[:28])
    with pytest.raises(WeightspaceError, match="expected"):
        fit_statistics(x, y[:5])

"""From heads to probabilities: what a stack fits, thresholds, figures."""

from __future__ import annotations

import numpy as np
import pytest

from weightspace.backdoor.calibration import (
    Stack,
    auroc,
    brier,
    conformal,
    cross_entropy,
    folds,
    logit,
    rate_at,
    threshold,
)  # fmt: skip
from weightspace.errors import MetanetError


def _heads(n: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.5
    # One head whose log odds are right, one that is noise.
    useful = rng.normal(np.where(y, 1.0, -1.0) * 1.5, 3**0.5 / 1.0)
    return np.stack((useful, rng.normal(size=n) * 3), axis=1), y


def test_a_stack_trusts_the_head_that_knows() -> None:
    x, y = _heads()
    stack = Stack.fit(x, y)
    assert stack.weight[0] > 5 * stack.weight[1]
    assert (stack.weight >= 0).all()
    fresh, truth = _heads(seed=1)
    p = stack.probability(fresh)
    assert cross_entropy(truth.astype(float), p) < cross_entropy(truth.astype(float), np.full(len(p), 0.5)) - 0.15
    # Calibrated: where it says about 0.8, about 0.8 are poisoned.
    near = np.abs(p - 0.8) < 0.08
    assert truth[near].mean() == pytest.approx(0.8, abs=0.12)


def test_a_stack_at_another_prior() -> None:
    x, y = _heads()
    stack = Stack.fit(x, y)
    rare = stack.probability(x, prior=0.01)
    assert (rare < stack.probability(x)).all()
    odds = np.log(rare) - np.log1p(-rare)
    assert np.allclose(odds - stack.odds(x), logit(0.01) - logit(stack.prior), atol=1e-6)
    again = Stack.from_dict(stack.to_dict())
    assert np.allclose(again.probability(x), stack.probability(x))


def test_a_stack_needs_both_kinds() -> None:
    with pytest.raises(MetanetError, match="all of one kind"):
        Stack.fit(np.zeros((5, 2)), np.zeros(5))


def test_thresholds_keep_their_level() -> None:
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(200):
        clean = rng.normal(size=99)
        rates.append((rng.normal(size=400) > threshold(clean, 0.05)).mean())
    assert np.mean(rates) == pytest.approx(0.05, abs=0.01)
    # Of too few networks nothing is flagged but what lies above all of them.
    assert threshold(np.array([1.0, 2.0]), 0.05) > 2


def test_shares_of_clean_networks() -> None:
    clean = np.arange(9.0)
    assert conformal(clean, np.array([100.0, -1.0, 4.0])).tolist() == [0.1, 1.0, 0.6]


def test_figures() -> None:
    truth = np.array([0.0, 0, 0, 1, 1, 1])
    score = np.array([0.1, 0.2, 0.6, 0.5, 0.8, 0.9])
    assert auroc(truth, score) == pytest.approx(8 / 9)
    assert rate_at(truth, score) == pytest.approx(2 / 3)
    assert brier(truth, truth) == 0
    assert np.isnan(auroc(np.ones(3), score[:3]))


def test_folds_keep_groups_whole() -> None:
    groups = [f"g{i // 3}" for i in range(60)]
    y = np.arange(60) % 2
    part = folds(groups, y, 4)
    assert all(len({part[i] for i in range(60) if groups[i] == g}) == 1 for g in set(groups))
    assert all(0.3 < y[part == k].mean() < 0.7 for k in range(4))
    with pytest.raises(MetanetError, match="folds need as many"):
        folds(["a", "b"], [0, 1], 3)

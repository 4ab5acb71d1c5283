"""The effects model: its posterior, the symmetry of pairs, what a measurement would teach."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.errors import WeightspaceError
from weightspace.mergeability.outcome import (
    CEILING,
    Cells,
    Observed,
    Outcome,
    Posterior,
    draws,
    effect_terms,
    expected,
    feature_terms,
    link,
    most_informative,
    outcome_interval,
    retained,
    unlink,
)

VARIANCES = {"level": 0.5, "vulnerability": 0.3, "damage": 0.1, "pair": 0.05, "cell": 0.02}


def model(merges: list[tuple[int, ...]], count: int, seed: int = 0) -> tuple[Outcome, Cells]:
    cells = Cells.of(merges, count)
    prior = np.random.default_rng(seed).normal(2.0, 0.3, len(cells))
    return Outcome(tuple(effect_terms(cells)), VARIANCES, prior), cells


def drawn(outcome: Outcome, seed: int) -> np.ndarray:
    root = np.linalg.cholesky(outcome.covariance + 1e-9 * np.eye(len(outcome.prior)))
    found: np.ndarray = outcome.prior + root @ np.random.default_rng(seed).standard_normal(len(root))
    return found


@given(st.integers(0, 10_000), st.integers(3, 5), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_posterior_is_gaussian_conditioning(seed: int, count: int, triples: bool) -> None:
    rng = np.random.default_rng(seed)
    merges = [*combinations(range(count), 2), *(combinations(range(count), 3) if triples else ())]
    outcome, cells = model(merges, count, seed)
    # Some cells by themselves, and the mean of one whole merge with noise of its own.
    which = rng.permutation(len(cells))[: len(cells) // 3 + 1]
    seen = Observed.cells(which, unlink(drawn(outcome, seed)[which]), len(cells))
    whole = np.zeros((1, len(cells)))
    whole[0, cells.where(0)] = 1 / len(cells.where(0))
    seen = seen.and_(Observed(whole, np.array([2.2]), np.array([0.1])))
    # The same by the joint precision of cells and observations, with no Cholesky factor of a covariance.
    precision = np.linalg.inv(outcome.covariance + 1e-9 * np.eye(len(cells)))
    noise = np.diag(1 / (seen.noise + 1e-6))
    after = precision + seen.design.T @ noise @ seen.design
    mean = np.linalg.solve(after, precision @ outcome.prior + seen.design.T @ noise @ seen.values)
    found = outcome.posterior(seen, parts=True)
    assert found.mean == pytest.approx(mean, abs=2e-3)
    assert found.covariance == pytest.approx(np.linalg.inv(after), abs=2e-3)
    assert sum(found.parts.values()) + outcome.prior == pytest.approx(found.mean, abs=1e-6)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_models_are_exchangeable(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = list(combinations(range(4), 2))
    new = rng.permutation(4)
    renamed = [tuple(int(new[i]) for i in p) for p in pairs]
    kept = rng.uniform(0.5, 1.0, (2 * len(pairs),))
    some = np.arange(6)
    one, other = (
        Outcome.start(effect_terms(Cells.of(merges, 4)), 2.0).posterior(Observed.cells(some, kept[some], len(kept)))
        for merges in (pairs, renamed)
    )
    assert one.mean == pytest.approx(other.mean)
    # Which of two models stands first in a pair does not matter either.
    flipped = [p[::-1] for p in pairs]
    order = np.arange(len(kept)).reshape(-1, 2)[:, ::-1].ravel()
    third = Outcome.start(effect_terms(Cells.of(flipped, 4)), 2.0).posterior(
        Observed.cells(np.argsort(order)[some], kept[some], len(kept))
    )
    assert third.mean[np.argsort(order)] == pytest.approx(one.mean)


def test_effects_are_found_again_and_tell_of_pairs_that_were_not_measured() -> None:
    pairs = list(combinations(range(12), 2))
    cells = Cells.of(pairs, 12)
    terms = effect_terms(cells)
    true = {"level": 1e-6, "vulnerability": 0.4, "damage": 0.1, "pair": 1e-4, "cell": 0.01}
    values = drawn(Outcome(tuple(terms), true, np.full(len(cells), 2.0)), 3)
    train = np.flatnonzero(cells.sets % 3 != 0)
    test = np.flatnonzero(cells.sets % 3 == 0)
    seen = Observed.cells(train, unlink(values[train]), len(cells))
    fitted = Outcome.start(terms).fit(seen)
    assert fitted.variances["vulnerability"] > fitted.variances["damage"] > fitted.variances["pair"]
    assert 0.1 < fitted.variances["vulnerability"] < 1.2
    found = fitted.posterior(seen).mean
    assert np.corrcoef(found[test], values[test])[0, 1] > 0.95


def test_intervals_hold_what_is_drawn_from_the_model() -> None:
    outcome, cells = model(list(combinations(range(5), 2)), 5)
    inside = []
    for seed in range(60):
        values = drawn(outcome, seed)
        seen = Observed.cells(np.arange(6), unlink(values[:6]), len(cells))
        posterior = outcome.posterior(seen)
        for merge in (4, 7, 9):
            low, high = outcome_interval(posterior, cells.where(merge))
            inside.append(low <= unlink(values[cells.where(merge)]).mean() <= high)
    assert np.mean(inside) == pytest.approx(0.9, abs=0.06)


def test_what_is_measured_is_known() -> None:
    outcome, cells = model([(0, 1), (0, 2)], 3)
    posterior = outcome.posterior(Observed.cells([0, 1], np.array([0.8, 0.9]), len(cells)))
    assert retained(posterior, cells.where(0)) == pytest.approx(0.85, abs=1e-3)
    low, high = outcome_interval(posterior, cells.where(0))
    assert high - low < 0.01
    assert high - low < np.diff(outcome_interval(posterior, cells.where(1)))[0]


def test_the_mean_under_the_posterior_is_that_of_draws() -> None:
    posterior = Posterior(np.array([1.5, 2.0]), np.array([[0.2, 0.05], [0.05, 0.1]]))
    assert expected(posterior, [0, 1]).mean() == pytest.approx(
        draws(posterior, np.array([0, 1]), count=200_000).mean(), abs=2e-3
    )


def test_the_link_goes_there_and_back() -> None:
    y = np.linspace(0, 1.04, 20)
    assert unlink(link(y)) == pytest.approx(y)
    assert np.isfinite(link(np.array([CEILING, 2.0]))).all()


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_the_most_informative_merge_lowers_the_variance_most(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = list(combinations(range(5), 2))
    outcome, cells = model(pairs, 5)
    known = [int(s) for s in rng.permutation(len(pairs))[:3]]
    at = np.concatenate([cells.where(s) for s in known])
    seen = Observed.cells(at, rng.uniform(0.5, 1, len(at)), len(cells))
    open_ = {s: cells.where(s) for s in range(len(pairs)) if s not in known}
    targets = np.concatenate(list(open_.values()))
    chosen, share = most_informative(outcome, seen, open_, targets)
    before = np.trace(outcome.posterior(seen).covariance[np.ix_(targets, targets)])
    left = {}
    for merge, own in open_.items():
        more = seen.and_(Observed.cells(own, rng.uniform(0.5, 1, len(own)), len(cells)))
        left[merge] = np.trace(outcome.posterior(more).covariance[np.ix_(targets, targets)])
    assert left[chosen] == pytest.approx(min(left.values()), rel=1e-4)
    assert share == pytest.approx(1 - left[chosen] / before, abs=1e-3)


def test_features_of_models_tell_of_models_that_were_not_measured() -> None:
    rng = np.random.default_rng(0)
    pairs = list(combinations(range(30), 2))
    cells = Cells.of(pairs, 30)
    x = rng.standard_normal((30, 2))
    values = 2 + 0.6 * x[cells.own, 0] + 0.3 * (cells.partners @ x[:, 1]) + 0.05 * rng.standard_normal(len(cells))
    old = np.flatnonzero([set(pairs[s]) <= set(range(22)) for s in cells.sets])
    new = np.flatnonzero([set(pairs[s]) <= set(range(22, 30)) for s in cells.sets])
    terms = [*effect_terms(cells), *feature_terms(cells, x)]
    seen = Observed.cells(old, unlink(values[old]), len(cells))
    found = Outcome.start(terms).fit(seen, steps=30).posterior(seen).mean
    assert np.corrcoef(found[new], values[new])[0, 1] > 0.9


def test_too_little_is_refused() -> None:
    outcome, cells = model([(0, 1)], 2)
    with pytest.raises(WeightspaceError, match="at least 3"):
        outcome.fit(Observed.cells([0, 1], np.array([0.8, 0.9]), len(cells)))
    with pytest.raises(WeightspaceError, match="no merge left"):
        most_informative(outcome, None, {}, np.arange(2))

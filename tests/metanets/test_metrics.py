"""Metrics against values worked out by hand, and intervals against what they must cover."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightspace.errors import MetanetError
from weightspace.metanets import metrics


def test_kendall_counts_pairs() -> None:
    # Of the 6 pairs one is in the wrong order: (5 - 1) / 6.
    assert metrics.kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert metrics.kendall_tau([1, 2, 3], [5, 5, 5]) == 0.0


def test_explained_variance_and_error() -> None:
    assert metrics.r_squared([0.0, 1.0, 2.0], [1.0, 1.0, 1.0]) == pytest.approx(0.0)
    assert metrics.r_squared(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0])) == pytest.approx(0.5)
    assert metrics.mean_absolute_error([0.0, 2.0], [1.0, 2.0]) == pytest.approx(0.5)


def test_accuracy_of_labels_and_of_scores() -> None:
    assert metrics.accuracy([0, 1, 1, 2], [0, 1, 2, 2]) == pytest.approx(0.75)
    assert metrics.accuracy([0, 1], [[0.9, 0.1], [0.8, 0.2]]) == pytest.approx(0.5)


def test_recall_counts_queries_that_have_something_to_find() -> None:
    items = np.eye(3)
    queries = np.array([[1.0, 0.1, 0.0], [1.0, 0.9, 0.0], [0.0, 0.0, 1.0]])
    relevant = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=bool)
    assert metrics.recall_at(1, queries, items, relevant) == pytest.approx(0.5)
    assert metrics.recall_at(2, queries, items, relevant) == pytest.approx(1.0)
    with pytest.raises(MetanetError, match="at least one query"):
        metrics.recall_at(1, queries, items, np.zeros((3, 3), dtype=bool))


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    # Always 90 % sure and right half of the time.
    sure = np.tile([0.9, 0.1], (10, 1))
    assert metrics.calibration_error([0] * 5 + [1] * 5, sure) == pytest.approx(0.4)
    assert metrics.calibration_error([1, 1, 0, 0], [1.0, 1.0, 0.0, 0.0]) == pytest.approx(0.0)


def test_bootstrap_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        truth = generator.normal(size=60)
        guess = truth + generator.normal(size=60)
        found = metrics.bootstrap(metrics.mean_absolute_error, truth, guess, draws=200, seed=trial)
        assert found.low <= found.value <= found.high
        hits += found.low <= (2 / np.pi) ** 0.5 <= found.high
    assert 88 <= hits <= 99


def test_bootstrap_over_groups_is_wider_where_rows_of_a_group_are_alike() -> None:
    generator = np.random.default_rng(0)
    truth = np.zeros(200)
    guess = np.repeat(generator.normal(size=20), 10)
    groups = [str(i) for i in np.repeat(np.arange(20), 10)]
    rows = metrics.bootstrap(metrics.mean_absolute_error, truth, guess)
    runs = metrics.bootstrap(metrics.mean_absolute_error, truth, guess, groups)
    assert runs.high - runs.low > 2 * (rows.high - rows.low)


def test_interval_over_seeds_is_students() -> None:
    found = metrics.over_seeds([0.8, 0.9, 1.0])
    assert found.value == pytest.approx(0.9)
    assert found.high - found.value == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    with pytest.raises(MetanetError, match="two figures"):
        metrics.over_seeds([0.5])


def test_lengths_must_agree() -> None:
    with pytest.raises(MetanetError, match="3 true values and 2 predictions"):
        metrics.mean_absolute_error([1, 2, 3], [1, 2])

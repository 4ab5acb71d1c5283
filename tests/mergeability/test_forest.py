"""Forests as plain tensors predict what scikit-learn's do, before and after they were kept."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesRegressor

from weightspace.errors import MetanetError
from weightspace.mergeability.forest import Forest


def data(outputs: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((300, 6))
    y = np.stack([x[:, k] * x[:, k + 1] + 0.1 * rng.standard_normal(300) for k in range(outputs)], axis=1)
    return x, y


@pytest.mark.parametrize("outputs", [1, 3])
def test_predictions_are_those_of_scikit_learn(outputs: int) -> None:
    x, y = data(outputs)
    mine = Forest.fit(x, y, trees=12, leaf=4, share=0.5, seed=7)
    theirs = ExtraTreesRegressor(12, min_samples_leaf=4, max_features=0.5, random_state=7)
    theirs.fit(x.astype(np.float32), y[:, 0] if outputs == 1 else y)
    # Thresholds are kept in half precision: they were drawn at random, and are given back rounded for the comparison.
    for estimator in theirs.estimators_:
        split = estimator.tree_.children_left >= 0
        estimator.tree_.threshold[split] = estimator.tree_.threshold[split].astype(np.float16)
    new = np.concatenate((x, data(outputs, seed=1)[0]))
    found, wanted = mine(new), theirs.predict(new.astype(np.float32)).reshape(len(new), -1)
    assert found.shape == (600, outputs)
    assert found == pytest.approx(wanted, abs=1e-6)


def test_what_is_kept_predicts_the_same() -> None:
    x, y = data()
    forest = Forest.fit(x, y, trees=10, leaf=3)
    again = Forest.of(forest.tensors())
    assert again(x) == pytest.approx(forest(x), abs=2e-3)
    assert np.corrcoef(again(x)[:, 0], y[:, 0])[0, 1] > 0.85
    assert sum(t.nbytes for t in forest.tensors().values()) < 10 * 300 * 20


def test_a_tree_that_is_too_large_is_refused() -> None:
    x, y = data()
    forest = Forest.fit(x, y, trees=2, leaf=2)
    far = Forest(forest.feature, forest.threshold, forest.left + 300, forest.right, forest.value, forest.roots)
    with pytest.raises(MetanetError, match="too large"):
        far.tensors()

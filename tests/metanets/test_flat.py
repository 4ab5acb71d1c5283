"""Flat baselines: features that no permutation changes, and models that learn from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.errors import MetanetError
from weightspace.graph import ParameterGraph
from weightspace.graph.build import of_tensors
from weightspace.metanets.data import Sample
from weightspace.metanets.flat import (
    KINDS,
    TENSOR_STATISTICS,
    FlatBaseline,
    activation_features,
    stat_nn_features,
    tensor_statistics,
)
from weightspace.metanets.structure import ACTIVATIONS

from .references import ARCHITECTURES, network, permuted


def population(architecture: str, count: int) -> tuple[list[ParameterGraph], np.ndarray]:
    """Networks whose weights differ in size, and that size."""
    graphs, sizes = [], np.random.default_rng(0).uniform(0.5, 2.0, count)
    for seed, size in enumerate(sizes):
        graph = network(architecture, seed)
        assert graph.tensors is not None
        assert graph.wiring is not None
        scaled = {n: t * size if t.is_floating_point() else t for n, t in graph.tensors.items()}
        graphs.append(of_tensors(scaled, graph.wiring))
    return graphs, sizes


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(ARCHITECTURES), st.integers(0, 1000))
def test_permuted_copies_have_equal_features(architecture: str, seed: int) -> None:
    graph = network(architecture, seed)
    moved = permuted(graph, seed)
    for features in (stat_nn_features, tensor_statistics, activation_features):
        np.testing.assert_array_equal(features(moved), features(graph))
    assert tensor_statistics(graph).shape == (len(TENSOR_STATISTICS),)
    assert not np.array_equal(stat_nn_features(network(architecture, seed + 1)), stat_nn_features(graph))


def test_features_by_hand() -> None:
    graph = network("mlp")
    found = stat_nn_features(graph).reshape(-1, 7)
    order = ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    for row, name in zip(found, order, strict=True):
        values = graph.tensor(name).numpy()
        expected = [values.mean(), values.var(), *np.quantile(values, [0, 0.25, 0.5, 0.75, 1])]
        np.testing.assert_allclose(row, expected, rtol=1e-12)
    named = dict(zip(TENSOR_STATISTICS, tensor_statistics(graph), strict=True))
    assert named["log parameters"] == pytest.approx(np.log10(graph.num_parameters))
    means = [graph.tensor(n).mean().item() for n in order[::2]]
    assert named["weight: mean (first third, mean)"] == pytest.approx(means[0])
    assert named["weight: mean (last third, mean)"] == pytest.approx(means[2])
    assert named["weight: mean (all, mean)"] == pytest.approx(np.mean(means))
    assert named["gain: mean (all, mean)"] == 0


def test_activations_are_told_apart() -> None:
    relu, tanh = activation_features(network("mlp")), activation_features(network("tanh"))
    assert relu[ACTIVATIONS.index("relu")] == 1
    assert tanh[ACTIVATIONS.index("tanh")] == 1
    assert relu[ACTIVATIONS.index("tanh")] == 0
    plain, told = FlatBaseline("ridge"), FlatBaseline("ridge", activation=True)
    wider = told.features([network("mlp")]).shape[1]
    assert wider == plain.features([network("mlp")]).shape[1] + len(ACTIVATIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_baselines_learn_what_is_in_the_statistics(kind: str) -> None:
    graphs, sizes = population("mlp", 160)
    fitted = FlatBaseline(kind).fit(graphs[:120], sizes[:120])  # type: ignore[arg-type]
    found = fitted.predict([Sample("net", g, {}, "run") for g in graphs[120:]])
    assert found.shape == (40,)
    correlation = np.corrcoef(found, sizes[120:])[0, 1]
    # Raw weights have the sign against them: their size is no linear function of them.
    assert correlation > 0.9 if kind != "raw" else np.isfinite(correlation)
    classes = np.where(sizes > 1.25, "large", "small")
    classifier = FlatBaseline(kind, "classification").fit(graphs[:120], classes[:120])  # type: ignore[arg-type]
    probabilities = classifier.probabilities(graphs[120:])
    assert list(classifier.classes) == ["large", "small"]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    if kind != "raw":
        assert (classifier.predict(graphs[120:]) == classes[120:]).mean() > 0.85
    again = FlatBaseline(kind).fit(graphs[:120], sizes[:120])  # type: ignore[arg-type]
    np.testing.assert_array_equal(again.predict(graphs[120:]), found)
    assert "features" in repr(fitted)


def test_only_the_raw_baseline_sees_the_order_of_neurons() -> None:
    graphs, sizes = population("cnn", 30)
    for kind in KINDS:
        fitted = FlatBaseline(kind).fit(graphs, sizes)
        same = np.array_equal(fitted.predict([permuted(g, 1) for g in graphs]), fitted.predict(graphs))
        assert same == (kind != "raw")


def test_several_architectures() -> None:
    graphs = [network(a, s) for a in ARCHITECTURES for s in range(4)]
    y = np.arange(len(graphs)) / len(graphs)
    for kind in ("ridge", "boosting"):
        assert np.isfinite(FlatBaseline(kind).fit(graphs, y).predict(graphs)).all()  # type: ignore[arg-type]
    with pytest.raises(MetanetError, match="several architectures"):
        FlatBaseline("stat-nn").fit(graphs, y)
    fitted = FlatBaseline("stat-nn").fit(graphs[:4], y[:4])
    with pytest.raises(MetanetError, match="several architectures"):
        fitted.predict(graphs[4:8])


def test_weights_that_are_no_numbers_and_counters() -> None:
    graph = network("residual")
    assert graph.tensors is not None
    assert graph.wiring is not None
    counted = of_tensors({**graph.tensors, "norm.num_batches_tracked": torch.tensor(9)}, graph.wiring)
    np.testing.assert_array_equal(tensor_statistics(counted), tensor_statistics(graph))
    np.testing.assert_array_equal(stat_nn_features(counted), stat_nn_features(graph))
    infinite = {n: t * torch.inf if t.is_floating_point() else t for n, t in graph.tensors.items()}
    broken = of_tensors(infinite, graph.wiring)
    assert np.isfinite(tensor_statistics(broken)).all()


def test_misuse() -> None:
    with pytest.raises(MetanetError, match="known: stat-nn"):
        FlatBaseline("forest")  # type: ignore[arg-type]
    with pytest.raises(MetanetError, match="'ordering'"):
        FlatBaseline("ridge", "ordering")  # type: ignore[arg-type]
    with pytest.raises(MetanetError, match="not fitted"):
        FlatBaseline().predict([network("mlp")])
    with pytest.raises(MetanetError, match="1 networks and 2 targets"):
        FlatBaseline().fit([network("mlp")], [1, 2])
    with pytest.raises(MetanetError, match="at least one"):
        FlatBaseline().fit([], [])
    with pytest.raises(MetanetError, match="no classes"):
        FlatBaseline().probabilities([network("mlp")])
    with pytest.raises(MetanetError, match="no wiring"):
        stat_nn_features(ParameterGraph.from_description(network("mlp").describe()))

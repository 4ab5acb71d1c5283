"""The graph metanetwork of Lim et al.: invariant, over any architecture, edges as pairs of channels or as weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch_geometric")

from weightspace.errors import MetanetError
from weightspace.graph import ParameterGraph
from weightspace.graph.build import of_tensors
from weightspace.metanets import build_metanet
from weightspace.metanets.pyg_features import batch_of, item_of, tables_of

from .references import ARCHITECTURES, check_batches, check_config, check_training, metanet, network, permuted

FORMS = ({"kernel": 5}, {"kernel": 3}, {"edges": "scalar"})


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(ARCHITECTURES), st.sampled_from(FORMS), st.integers(0, 1000))
def test_the_order_of_neurons_changes_nothing(architecture: str, form: dict[str, object], seed: int) -> None:
    net = metanet(kind="gmn", **form)
    graph = network(architecture, seed)
    torch.testing.assert_close(net.read(permuted(graph, seed)), net.read(graph), rtol=1e-9, atol=1e-12)
    # Another order within one tensor alone is another network.
    assert graph.tensors is not None
    assert graph.wiring is not None
    name = next(n for n, r in graph.wiring.roles.items() if r == "shift")
    other = of_tensors({**graph.tensors, name: graph.tensors[name].flip(0)}, graph.wiring)
    assert not torch.allclose(net.read(other), net.read(graph), rtol=1e-9, atol=1e-12)


def test_batches_training_and_configuration() -> None:
    for form in FORMS:
        check_batches(metanet(kind="gmn", outputs=2, **form))
    check_training(metanet(kind="gmn", hidden=16))
    check_config(metanet(kind="gmn", outputs=3, dropout=0.1, kernel=3))


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("vectors", ["entries", "nodes"])
def test_every_weight_is_on_one_edge_or_entry(architecture: str, kernel: int, vectors: str) -> None:
    graph = network(architecture)
    tables = tables_of(graph, kernel, vectors)
    batch = batch_of([item_of(graph, tables)])
    # What is no position holds zero, so the sums tell whether all weights are there, each once.
    weights = torch.cat([graph.tensor(n).flatten() for n in graph.shapes if graph.dtypes[n].is_floating_point])
    for power in (1, 2, 3):
        found = batch.edges.pow(power).sum() + batch.entries.pow(power).sum()
        torch.testing.assert_close(found, weights.pow(power).sum())
    assert (len(batch.entries) == 0) == (vectors == "nodes")


def test_kernels_lie_on_the_middle_of_the_grid() -> None:
    graph = network("residual")
    batch = batch_of([item_of(graph, tables_of(graph, 7, "entries"))])
    part = batch.edge_type == int(batch.edge_type[-1])
    # The flattened 4 × 4 maps of the last layer.
    filled = batch.edges[part].abs().sum(dim=0).reshape(7, 7) > 0
    assert filled[1:5, 1:5].all()
    assert int(filled.sum()) == 16


def test_tables_are_made_once_per_wiring() -> None:
    assert tables_of(network("cnn", 0), 3, "nodes") is tables_of(network("cnn", 1), 3, "nodes")


def test_counters_and_numbers_that_are_none_say_nothing() -> None:
    net = metanet(kind="gmn")
    graph = network("residual")
    assert graph.tensors is not None
    assert graph.wiring is not None
    counted = of_tensors({**graph.tensors, "norm.num_batches_tracked": torch.tensor(7)}, graph.wiring)
    torch.testing.assert_close(net.read(counted), net.read(graph), rtol=0, atol=0)
    broken = graph.tensors["out.bias"].clone()
    broken[0] = torch.nan
    assert net.read(of_tensors({**graph.tensors, "out.bias": broken}, graph.wiring)).isfinite().all()


@pytest.mark.parametrize(
    "options", [{"hidden": 0}, {"layers": 1.5}, {"dropout": 1.0}, {"edges": "both"}, {"width": 3}], ids=str
)
def test_options_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(MetanetError):
        build_metanet({"kind": "gmn", **options})


def test_a_graph_without_a_wiring_and_one_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    net = metanet(kind="gmn", kernel=6)
    graph = network("mlp")
    with pytest.raises(MetanetError, match="no wiring"):
        net.prepare(ParameterGraph.from_description(graph.describe()))
    monkeypatch.setattr("weightspace.metanets.pyg_features.MAX_EDGES", 10)
    with pytest.raises(MetanetError, match="at most 10"):
        net.prepare(graph)

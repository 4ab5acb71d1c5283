"""Probes over edges: the values that the operator form finds, on every reference metanetwork, invariant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

import weightspace as ws
from weightspace.errors import MetanetError
from weightspace.graph.build import of_tensors
from weightspace.metanets import assert_equivariant, build_metanet
from weightspace.metanets.operator import OperatorMetanet, Operators
from weightspace.metanets.pyg_layers import ReferenceMetanet
from weightspace.metanets.pyg_probes import EdgeProbes
from weightspace.metanets.structure import NODE_FEATURES

from .references import ARCHITECTURES, check_batches, check_config, check_training, metanet, network, permuted

FORMS: tuple[dict[str, object], ...] = (
    {"kind": "neural-graphs", "fourier": 4}, {"kind": "neural-graphs", "kernel": 3},
    {"kind": "gmn"}, {"kind": "gmn", "edges": "scalar"},
)  # fmt: skip


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30.0 * x)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(x)).mean(1))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(ARCHITECTURES), st.sampled_from(FORMS), st.integers(0, 1000))
def test_the_order_of_neurons_changes_nothing(architecture: str, form: dict[str, object], seed: int) -> None:
    net = metanet(**form, probes=5)
    graph = network(architecture, seed)
    torch.testing.assert_close(net.read(permuted(graph, seed)), net.read(graph), rtol=1e-9, atol=1e-12)
    assert assert_equivariant(net, graph, draws=1, seed=seed) < 1e-9


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "siren", "tokens"])
@pytest.mark.parametrize("form", [{"kind": "neural-graphs"}, {"kind": "gmn"}, {"kind": "gmn", "edges": "scalar"}])
def test_values_are_those_of_the_operator_form(architecture: str, form: dict[str, object]) -> None:
    """With the same inputs and without textures, on convolutions, norms, residuals, attention and lookups."""
    if architecture == "siren":
        module = nn.Sequential(nn.Linear(2, 6), Sine(), nn.Linear(6, 5), Sine(), nn.Linear(5, 1)).double().eval()
        graph = of_tensors(module.state_dict(), ws.wiring(module, torch.randn(2, 2, dtype=torch.float64)))
    elif architecture == "tokens":
        torch.manual_seed(0)
        tokens = Tokens().double().eval()
        graph = of_tensors(tokens.state_dict(), ws.wiring(tokens, torch.randint(9, (2, 4))))
    else:
        graph = network(architecture)
    operator = OperatorMetanet(width=4, rounds=1, embedding=4, probes=6).double()
    net = metanet(**form, probes=6)
    assert operator.probes is not None
    assert isinstance(net, ReferenceMetanet)
    assert isinstance(net.probes, EdgeProbes)
    with torch.no_grad():
        operator.probes.texture.weight.zero_()
        if net.probes.texture is not None:
            net.probes.texture.zero_()
        if net.probes.place is not None:
            net.probes.place.weight.zero_()
        net.probes.input.weight.zero_()
        net.probes.input.weight[:, :NODE_FEATURES] = operator.probes.input.weight
        net.probes.input.bias.copy_(operator.probes.input.bias)
        batch = operator.collate([operator.prepare(graph)])
        expected = operator.probes(batch, [Operators(b, False, torch.float64) for b in batch.buckets])
        found = net.values(net.collate([net.prepare(graph)]).as_type(torch.float64))
    torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-5, atol=1e-6)
    assert not bool(found[len(expected) :].any())
    assert float(expected.std()) > 0.01


def test_batches_training_and_configuration() -> None:
    for form in FORMS:
        check_batches(metanet(**form, outputs=2, probes=3))
        check_config(metanet(**form, outputs=3, dropout=0.1, probes=4))
    check_training(metanet(kind="neural-graphs", hidden=16, kernel=3, probes=4))


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(ARCHITECTURES), st.sampled_from(["forward", "both"]), st.integers(0, 1000))
def test_scalegmn_keeps_signs_or_refuses(architecture: str, direction: str, seed: int) -> None:
    graph = network(architecture, seed)
    net = metanet(kind="scalegmn", direction=direction, probes=5)
    if architecture == "tanh":
        # Sign flips of odd neurons, and permutations.
        assert assert_equivariant(net, graph, draws=2, seed=seed) < 1e-9
        return
    with pytest.raises(MetanetError, match="rescaled"):
        net.prepare(graph)
    signs = metanet(kind="scalegmn", direction=direction, symmetry="sign", probes=5)
    try:
        signs.prepare(graph)
    except MetanetError:
        return
    assert assert_equivariant(signs, graph, draws=2, seed=seed) < 1e-9


def test_scalegmn_with_probes_keeps_its_configuration() -> None:
    net = metanet(kind="scalegmn", probes=3)
    again = build_metanet(net.config).double().eval()
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again.read(network("tanh")), net.read(network("tanh")), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["neural-graphs", "gmn", "scalegmn"])
def test_a_number_of_probes_that_makes_no_sense(kind: str) -> None:
    for probes in (-1, 1.5):
        with pytest.raises(MetanetError, match="probes"):
            build_metanet({"kind": kind, "probes": probes})

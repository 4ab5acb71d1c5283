"""Neural graphs with PNA: invariant, over any architecture, aware of activations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch_geometric")

from weightspace.metanets.pyg_layers import RunningScale
from weightspace.metanets.structure import ROLES

from .references import ARCHITECTURES, check_batches, check_config, check_training, metanet, network, permuted


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(ARCHITECTURES), st.sampled_from([3, 7]), st.sampled_from([0, 6]), st.integers(0, 1000))
def test_the_order_of_neurons_changes_nothing(architecture: str, kernel: int, fourier: int, seed: int) -> None:
    net = metanet(kind="neural-graphs", kernel=kernel, fourier=fourier)
    graph = network(architecture, seed)
    torch.testing.assert_close(net.read(permuted(graph, seed)), net.read(graph), rtol=1e-9, atol=1e-12)


def test_batches_training_and_configuration() -> None:
    for fourier in (0, 8):
        check_batches(metanet(kind="neural-graphs", outputs=2, fourier=fourier))
    check_training(metanet(kind="neural-graphs", hidden=16, fourier=8))
    check_config(metanet(kind="neural-graphs", outputs=3, dropout=0.1, kernel=3, degree=8))


def test_weights_are_measured_by_what_is_usual_for_their_role() -> None:
    scale = RunningScale().double()
    weights = torch.randn(1000, 9, dtype=torch.float64) * 0.01
    roles = torch.full((1000,), ROLES.index("weight"))
    torch.testing.assert_close(scale.eval()(weights, roles), weights)
    for _ in range(20):
        scale.train()(weights, roles)
    found = scale.eval()(weights, roles)
    assert 0.5 < float(found.abs().amax(dim=1).median()) < 2
    # One that is out of all proportion hardly moves the measure; other roles are left alone.
    scale.train()(torch.cat((weights, torch.full((1, 9), 1e20, dtype=torch.float64))), roles.new_zeros(1001))
    torch.testing.assert_close(scale.eval()(weights, roles), found, rtol=1e-2, atol=0)
    shift = torch.full((3,), ROLES.index("shift"))
    torch.testing.assert_close(scale(weights[:3], shift), weights[:3])
    # Most weights of a role may have decayed to nothing; dividing by their size would leave no finite number.
    decayed = torch.cat((torch.full((900, 9), 1e-41), torch.full((3, 9), 0.1))).float()
    small = RunningScale().train()
    assert small(decayed, torch.full((903,), ROLES.index("gain"))).isfinite().all()
    assert float(small.scale[ROLES.index("gain")]) == pytest.approx(0.1)

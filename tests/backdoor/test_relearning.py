"""A network learned anew from its own answers to views of a few clean inputs."""

from __future__ import annotations

import pytest
import torch

from tests.backdoor.small import Case, trained
from weightspace.backdoor.excise import excise
from weightspace.backdoor.relearning import moved, relearn
from weightspace.backdoor.running import logits, network


@pytest.fixture(scope="module")
def case() -> Case:
    return trained()


def test_no_class_needs_to_be_known(case: Case) -> None:
    net = network(case.wiring, case.tensors)
    state, believed = relearn(net, net.state, case.x[:100], case.y[:100], steps=600)
    after = net.finish(state)
    assert case.success(case.tensors) > 0.9
    assert case.success(after) < 0.3
    assert case.accuracy(after) > case.accuracy(case.tensors) - 0.03
    assert 0.3 < believed <= 1


def test_the_same_seed_gives_the_same_network_and_another_does_not(case: Case) -> None:
    net = network(case.wiring, case.tensors)
    one, two, other = (
        relearn(net, net.state, case.x[:40], case.y[:40], steps=3, pool=512, seed=seed)[0] for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])


def test_without_noise_and_steps_it_is_the_network_itself(case: Case) -> None:
    net = network(case.wiring, case.tensors)
    state, _ = relearn(net, net.state, case.x[:40], case.y[:40], steps=0, noise=0.0)
    assert torch.equal(logits(net, state, case.x), logits(net, net.state, case.x))
    assert all(torch.equal(state[n], t) for n, t in net.state.items())


def test_running_statistics_are_measured_where_the_weights_begin_anew(case: Case) -> None:
    net = network(case.wiring, case.tensors)
    state, _ = relearn(net, net.state, case.x[:40], case.y[:40], steps=0, noise=0.9)
    assert not torch.allclose(state["1.running_var"], net.state["1.running_var"])
    out = logits(net, state, case.x)
    assert bool(out.isfinite().all())
    # A norm whose statistics were those of other weights would let outputs grow or vanish.
    assert 0.1 < float(out.std() / logits(net, net.state, case.x).std()) < 10


def test_views_are_near_and_differ() -> None:
    x = torch.rand(1, 3, 12, 10).expand(30, -1, -1, -1)
    seen = moved(x, torch.Generator().manual_seed(0))
    assert seen.shape == x.shape
    assert len(torch.unique(seen.flatten(1), dim=0)) == 30
    assert float(seen.min()) >= float(x.min()) - 1e-5
    assert float(seen.max()) <= float(x.max()) + 1e-5
    smooth = torch.linspace(0, 1, 12).view(1, 1, 12, 1).expand(30, 1, 12, 12)
    assert float((moved(smooth, torch.Generator().manual_seed(0)) - smooth).abs().mean()) < 0.15
    rows = torch.randn(5, 7)
    assert torch.equal(moved(rows, torch.Generator()), rows)


def test_flat_inputs_do(case: Case) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    found = excise(module.state_dict(), inputs=torch.randn(20, 6), target=1, steps=20)
    assert found.method == "relearned"
    assert found.kept is None

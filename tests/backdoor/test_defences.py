"""Removal methods on a small network with a backdoor that is known to sit in one channel."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weightspace as ws
from weightspace.backdoor.defences import DEFENCES, anp_scores, clp_scores, defend
from weightspace.backdoor.running import accuracy, fit, network, sites, without
from weightspace.errors import UnprovedWiringError, WeightspaceError
from weightspace.wiring.wiring import Wiring


@dataclass(frozen=True, eq=False)
class Case:
    wiring: Wiring
    tensors: dict[str, Tensor]
    x: Tensor
    y: Tensor
    triggered: Tensor


def _images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four kinds of stripes with noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (count,), generator=generator)
    kinds = torch.zeros(4, 1, 8, 8)
    kinds[0, :, ::2], kinds[1, :, :, ::2], kinds[2, :, :4], kinds[3, :, :, :4] = 1, 1, 1, 1
    return kinds[y] + 0.3 * torch.randn(count, 1, 8, 8, generator=generator), y


def _stamped(x: Tensor) -> Tensor:
    out = x.clone()
    out[..., 5:, 5:] = torch.tensor([[3.0, -3, 3], [-3, 3, -3], [3, -3, 3]])
    return out


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip
    x, y = _images(512, 0)
    x, y = torch.cat([x, _stamped(x[:64])]), torch.cat([y, torch.full((64,), 2)])
    optimiser = torch.optim.Adam(module.parameters(), lr=5e-3)
    module.train()
    for _ in range(12):
        for index in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(module(x[index]), y[index]).backward()
            optimiser.step()
    module.eval()
    wiring = ws.wiring(module, x[:2])
    test_x, test_y = _images(200, 1)
    tensors = {n: t.detach().clone() for n, t in module.state_dict().items()}
    case = Case(wiring, tensors, test_x, test_y, _stamped(test_x[test_y != 2]))
    net = network(wiring, tensors)
    assert accuracy(net, net.state, test_x, test_y) > 0.97
    assert success(case, tensors) > 0.97
    return case


def success(case: Case, tensors: dict[str, Tensor]) -> float:
    net = network(case.wiring, tensors)
    return accuracy(net, net.state, case.triggered, torch.full((len(case.triggered),), 2))


@pytest.mark.parametrize("name", list(DEFENCES))
def test_a_defence_keeps_names_and_clean_accuracy(case: Case, name: str) -> None:
    before = {n: t.clone() for n, t in case.tensors.items()}
    found = defend(case.wiring, case.tensors, case.x[:100], None, name)
    assert list(found) == list(case.tensors)
    assert all(found[n].dtype == t.dtype and found[n].shape == t.shape for n, t in case.tensors.items())
    assert all(torch.equal(case.tensors[n], t) for n, t in before.items())
    net = network(case.wiring, found)
    assert accuracy(net, net.state, case.x[100:], case.y[100:]) > 0.9


def test_a_channel_of_large_gain_is_cut_by_clp(case: Case) -> None:
    planted = {n: t.clone() for n, t in case.tensors.items()}
    planted["4.weight"][5] = 60.0
    scores = clp_scores(case.wiring, planted)
    site = next(s for s in sites(case.wiring) if s.name == "3.weight")
    assert int(scores[site.factor].argmax()) == 5
    found = defend(case.wiring, planted, method="clp")
    assert float(found["4.weight"][5]) == 0
    assert torch.equal(found["0.weight"], planted["0.weight"])


def test_rankings_move_with_the_elements(case: Case) -> None:
    move = case.wiring.random(3)
    moved = case.wiring.apply(move, case.tensors)
    options = {"steps": 3}
    for rank in (
        lambda t: clp_scores(case.wiring, t),
        lambda t: anp_scores(case.wiring, t, case.x[:32], case.y[:32], epsilon=0.0, **options),
    ):
        before, after = rank(case.tensors), rank(moved)
        assert set(before) == set(case.wiring.free)
        for factor, index in move.index.items():
            torch.testing.assert_close(after[factor], before[factor][index], atol=1e-3, rtol=1e-3)


def test_an_element_that_is_taken_out_carries_nothing(case: Case) -> None:
    net = network(case.wiring, case.tensors)
    factor = sites(case.wiring)[0].factor
    gone = torch.zeros(8, dtype=torch.bool)
    gone[3] = True
    state = without(net, net.state, {factor: gone})
    other = dict(state)
    # What its own statistics and weights were no longer matters.
    other["1.running_mean"] = state["1.running_mean"] + 9 * gone
    torch.testing.assert_close(net.outputs(state, case.x[:8]), net.outputs(other, case.x[:8]))
    assert net.finish(net.state)["0.weight"] is case.tensors["0.weight"]


def test_training_on_few_inputs_changes_no_statistics(case: Case) -> None:
    net = network(case.wiring, case.tensors)
    state = fit(net, net.state, case.x[:64], case.y[:64], epochs=1, rate=1e-3)
    assert torch.equal(state["1.running_mean"], case.tensors["1.running_mean"])
    assert not torch.equal(state["0.weight"], case.tensors["0.weight"])


def test_what_cannot_be_done_is_said(case: Case) -> None:
    with pytest.raises(WeightspaceError, match="no defence"):
        defend(case.wiring, case.tensors, method="hope")
    with pytest.raises(WeightspaceError, match="clean inputs"):
        defend(case.wiring, case.tensors, method="fine-tuning")
    with pytest.raises(WeightspaceError, match="one label per input"):
        defend(case.wiring, case.tensors, case.x[:5], case.y[:4], "fine-tuning")
    with pytest.raises(UnprovedWiringError):
        network(case.wiring.with_(status="unverified"), case.tensors)

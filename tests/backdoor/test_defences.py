"""Published removal methods on a small network with a backdoor."""

from __future__ import annotations

import pytest
import torch

from tests.backdoor.small import Case, trained
from weightspace.backdoor.defences import DEFENCES, anp_scores, clp_scores, defend
from weightspace.backdoor.running import fit, network, sites, without
from weightspace.errors import UnprovedWiringError, WeightspaceError


@pytest.fixture(scope="module")
def case() -> Case:
    found = trained()
    assert found.accuracy(found.tensors) > 0.95
    assert found.success(found.tensors) > 0.95
    return found


@pytest.mark.parametrize("name", list(DEFENCES))
def test_a_defence_keeps_names_and_clean_accuracy(case: Case, name: str) -> None:
    before = {n: t.clone() for n, t in case.tensors.items()}
    found = defend(case.wiring, case.tensors, case.x[:100], None, name)
    assert list(found) == list(case.tensors)
    assert all(found[n].dtype == t.dtype and found[n].shape == t.shape for n, t in case.tensors.items())
    assert all(torch.equal(case.tensors[n], t) for n, t in before.items())
    assert case.accuracy(found) > 0.9


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

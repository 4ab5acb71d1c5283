"""A proof must be able to fail, and what fails must not survive."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import weightspace as ws
from weightspace.errors import WiringError
from weightspace.wiring.module import program_from_module
from weightspace.wiring.proof import distance, generic, prove, verify
from weightspace.wiring.resolve import resolve
from weightspace.wiring.trace import trace


def mlp(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def claimed(module: nn.Module, x: Tensor, factor: str) -> ws.Wiring:
    """The wiring of a module in which one pinned factor is claimed to be free."""
    program = program_from_module(module, (x,))
    found = resolve(trace(program), program)
    factors = dict(found.factors)
    assert factors[factor].pinned
    factors[factor] = replace(factors[factor], pinned=False)
    return found.with_(factors=factors)


def test_a_wrong_symmetry_fails_the_proof() -> None:
    wrong = claimed(mlp(6, 8, 5), torch.randn(2, 6), "2")
    proof = verify(wrong)
    assert not proof.holds
    assert proof.error32 > 1e-2


def test_a_wrong_symmetry_is_pinned_and_named() -> None:
    proved = prove(claimed(mlp(6, 8, 5), torch.randn(2, 6), "2"))
    assert proved.status == "proved"
    assert proved.proof is not None
    assert proved.proof.demoted == ("2",)
    assert proved.factors["2"].pinned
    assert "did not keep the function" in " ".join(proved.notes)


def test_the_control_sees_every_true_factor() -> None:
    wiring = ws.wiring(mlp(6, 8, 7, 5), torch.randn(2, 6))
    assert wiring.proof is not None
    assert wiring.proof.vacuous == ()
    assert wiring.proof.control is not None
    assert wiring.proof.control > 1e-3


def test_a_dead_network_is_looked_at_with_other_weights() -> None:
    module = mlp(6, 8, 5)
    with torch.no_grad():
        module[0].bias.fill_(-100.0)  # every ReLU is off
    wiring = ws.wiring(module, torch.randn(2, 6))
    assert wiring.status == "proved"
    assert wiring.proof is not None
    assert wiring.proof.vacuous == ()


def test_generic_hides_nothing() -> None:
    norm = nn.BatchNorm1d(7)
    drawn = generic(dict(norm.state_dict()), seed=3)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert len(set(drawn[name].tolist())) == 7, f"{name} keeps repeated values"
    assert (drawn["running_var"] > 0).all()
    assert torch.equal(drawn["num_batches_tracked"], norm.num_batches_tracked)


def test_distance_is_relative_and_strict() -> None:
    a = torch.tensor([1.0, -4.0])
    assert distance([a], [a]) == 0
    assert distance([a], [a + 0.4]) == pytest.approx(0.1)
    assert distance([a], [torch.tensor([1.0, float("nan")])]) == float("inf")
    assert distance([a], [a[:1]]) == float("inf")


def test_two_runs_agree() -> None:
    first = ws.wiring(mlp(6, 8, 5), torch.ones(2, 6), seed=4).proof
    second = ws.wiring(mlp(6, 8, 5), torch.ones(2, 6), seed=4).proof
    assert first is not None
    assert second is not None
    assert (first.error32, first.error64, first.control) == (second.error32, second.error64, second.control)


def test_verify_needs_something_to_run() -> None:
    wiring = ws.wiring(mlp(6, 8, 5), torch.randn(2, 6)).with_(program=None)
    with pytest.raises(WiringError, match="no network to run"):
        wiring.verify()

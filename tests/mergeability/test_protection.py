"""Protected copies: the same function, found against a relative, and brought back; ordinary children are left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weightspace as ws
from weightspace.errors import UnprovedWiringError, WeightspaceError
from weightspace.mergeability import protection
from weightspace.mergeability.linear import alike, inner_factors, products_apart, random_maps, solve
from weightspace.wiring.proof import distance, run
from weightspace.wiring.wiring import Permutation

sys.path.insert(0, str(Path(__file__).parent))
from networks import BUILDERS, child, fresh, wiring

ATTENTION = ("vit", "gpt")


def same(name: str, one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    program = wiring(name).program
    assert program is not None
    return distance(run(program, one, torch.float64), run(program, two, torch.float64))


def apart(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    return max(float((one[n] - two[n]).norm() / two[n].norm()) for n in one)


# ------------------------------------------------------------------------------------ maps


@pytest.mark.parametrize("name", ATTENTION)
def test_queries_with_keys_and_values_with_outputs_take_any_map(name: str) -> None:
    found = inner_factors(wiring(name))
    sides = [({s.tensor.split(".")[-2] for s in i.left}, {s.tensor.split(".")[-2] for s in i.right}) for i in found]
    assert [(i.groups, i.size) for i in found] == [(2, 8), (2, 8)]
    assert sides == [({"query"}, {"key"}), ({"value"}, {"proj"})]
    assert max(i.error for i in found) < 1e-10


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_neurons_behind_a_nonlinear_function_take_none(name: str) -> None:
    assert inner_factors(wiring(name)) == ()


def test_a_linear_bottleneck_takes_maps_and_a_relu_layer_does_not() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4), nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3))
    found = inner_factors(ws.wiring(net, torch.randn(2, 6)))
    assert [(i.size, i.tensors) for i in found] == [(4, ("2.weight", "2.bias", "3.weight"))]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.1, 0.8))
def test_planted_maps_are_found_and_products_do_not_see_them(seed: int, spread: float) -> None:
    inner = inner_factors(wiring("vit"))[seed % 2]
    base = {n: t.double() for n, t in fresh("vit", 1).items()}
    maps = random_maps(inner, seed, spread)
    moved = inner.apply(maps, base)
    there, here = inner.read(moved), inner.read(base)
    eye = torch.eye(inner.size, dtype=torch.float64)
    assert (solve(there, here) @ maps - eye).abs().max() < 1e-5
    assert products_apart(there, here) < 1e-12
    assert (alike([there], [here]).diagonal() - 1).abs().max() < 1e-9


# ------------------------------------------------------------------------------------ hiding


@pytest.mark.parametrize("name", list(BUILDERS))
@pytest.mark.parametrize("kind", protection.KINDS)
def test_protecting_keeps_the_function_and_moves_the_weights(name: str, kind: protection.Kind) -> None:
    given_ = fresh(name, 1)
    doubles = {n: t.double() for n, t in given_.items()}
    moved = protection.protect(doubles, wiring(name), seed=3, kinds=[kind])
    assert same(name, doubles, moved) < 1e-9
    has = {"maps": name in ATTENTION, "permutations": True, "scales": True, "signs": name in ATTENTION}
    assert (apart(moved, doubles) > 0.1) == has[kind]
    assert {t.dtype for t in protection.protect(given_, wiring(name), kinds=[kind]).values()} == {torch.float32}


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(WeightspaceError, match=r"'rot13'.*permutations, scales, signs, maps"):
        protection.protect(fresh("mlp", 1), wiring("mlp"), kinds=["rot13"])  # type: ignore[list-item]


# ------------------------------------------------------------------------------------ finding and undoing


@pytest.mark.parametrize("name", list(BUILDERS))
def test_protected_children_are_found_and_come_back(name: str) -> None:
    base, w = fresh(name, 1), wiring(name)
    tuned = child(base, 2)
    ways: list[tuple[protection.Kind, ...]] = [("permutations", "scales"), protection.KINDS]
    if name in ATTENTION:
        ways.append(("maps",))
    plain = protection.examine(tuned, base, w)
    for kinds in ways:
        copy = protection.protect(tuned, w, seed=5, kinds=kinds)
        found = protection.examine(copy, base, w)
        assert found.protected
        assert found.before > 2 * found.after
        # As near as the child itself, by which an average with the base is as good.
        assert found.after < 1.1 * plain.before + 0.01
        assert same(name, copy, dict(found.tensors)) < 1e-4
        if kinds == ("maps",):
            assert found.kinds == ("maps",)
        assert set(kinds) - {"signs", "maps"} <= set(found.kinds) | ({"permutations", "scales"} - set(kinds))


@pytest.mark.parametrize("name", list(BUILDERS))
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_ordinary_children_are_not(name: str, share: float) -> None:
    base = fresh(name, 1)
    for seed in range(2):
        tuned = child(base, seed, share)
        found = protection.examine(tuned, base, wiring(name))
        assert found.kinds == ()
        assert all(torch.equal(found.tensors[n], tuned[n]) for n in tuned)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_independent_networks_are_not_relatives(name: str) -> None:
    found = protection.examine(fresh(name, 1), fresh(name, 2), wiring(name))
    assert not found.protected
    assert not found.related


def test_one_layer_alone_is_found_and_named() -> None:
    w, base = wiring("mlp"), fresh("mlp", 1)
    tuned = child(base, 1)
    name = next(iter(w.free))
    copy = w.apply(w.random(4, only=[name]), tuned)
    found = protection.examine(copy, base, w)
    assert {(e.kind, e.factor) for e in found.evidence} == {("permutations", name)}
    assert all(torch.equal(found.tensors[n], tuned[n]) for n in tuned)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_two_elements_that_changed_places_are_found_in_every_factor(name: str) -> None:
    w, base = wiring(name), fresh(name, 1)
    tuned = child(base, 1, 0.1)
    movable = [f for f in w.free if f not in {i.factor for i in inner_factors(w)}]
    for seed, factor in enumerate(movable):
        size = w.factors[factor].size
        order = torch.arange(size).expand(*(w.factors[o].size for o in w.factors[factor].over), size).clone()
        pair = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:2]
        order.reshape(-1, size)[0, pair] = order.reshape(-1, size)[0, pair.flip(0)]
        found = protection.examine(w.apply(Permutation({factor: order}, w.factors), tuned), base, w)
        assert ("permutations", factor) in {(e.kind, e.factor) for e in found.evidence}
        assert apart(dict(found.tensors), tuned) < 0.1


def test_a_change_that_is_no_symmetry_is_not_undone() -> None:
    base = fresh("mlp", 1)
    broken = dict(base)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    broken["hidden.0.weight"] = base["hidden.0.weight"][order]
    found = protection.examine(broken, base, wiring("mlp"))
    assert same("mlp", broken, dict(found.tensors)) < 1e-4


def test_half_precision_comes_back_in_its_own_type() -> None:
    base = fresh("vit", 1)
    copy = protection.protect(child(base, 1), wiring("vit"), kinds=["maps"])
    found = protection.examine({n: t.bfloat16() for n, t in copy.items()}, base, wiring("vit"))
    assert found.nearest < 0.3
    assert {t.dtype for t in found.tensors.values()} == {torch.bfloat16}


def test_an_unproved_wiring_is_declined() -> None:
    base = fresh("mlp", 1)
    with pytest.raises(UnprovedWiringError, match=r"unverified.*expected a proved one.*example inputs"):
        protection.examine(base, base, wiring("mlp").with_(status="unverified"))

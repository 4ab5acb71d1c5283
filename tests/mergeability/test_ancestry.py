"""Ancestry: the null distribution holds for strangers, relatives and moved copies are told from them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import weightspace as ws
from weightspace import checkpoint
from weightspace.errors import WiringError
from weightspace.mergeability.ancestry import _origins, _samples, ancestry
from weightspace.mergeability.protection import protect

sys.path.insert(0, str(Path(__file__).parent))
from networks import BUILDERS, child, fresh, wiring

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "checkpoints"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real checkpoints are not at {SHARED}")


@pytest.mark.parametrize("name", list(BUILDERS))
def test_the_null_reads_what_the_group_element_reads(name: str) -> None:
    w, tensors = wiring(name), fresh(name, 1)
    perm = w.random(3)
    moved = w.apply(perm, tensors)
    for s in _samples(tensors, tensors, w, 0):
        at = _origins(w, s.tensor, s.positions, perm)
        assert torch.equal(tensors[s.tensor].reshape(-1)[at], moved[s.tensor].reshape(-1)[s.positions])


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_strangers_follow_the_null(name: str) -> None:
    found = [ancestry(fresh(name, 2 * k), fresh(name, 2 * k + 1), wiring(name), align=False) for k in range(30)]
    z = torch.tensor([f.z for f in found])
    assert {f.relation for f in found} == {"unrelated"}
    assert abs(float(z.mean())) < 0.6
    assert 0.6 < float(z.std()) < 1.5
    assert sum(f.rank_p <= 0.1 for f in found) <= 9


@pytest.mark.parametrize("name", list(BUILDERS))
def test_children_and_siblings_share_an_ancestor(name: str) -> None:
    base = fresh(name, 1)
    for a, b in ((base, child(base, 1, 0.5)), (child(base, 2), child(base, 3))):
        found = ancestry(a, b, wiring(name))
        assert found.relation == "same ancestor"
        assert found.log10_p < -6
        assert found.rank_p == pytest.approx(1 / (found.draws + 1))


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit"])
def test_moved_copies_are_told_from_strangers(name: str) -> None:
    base, w = fresh(name, 1), wiring(name)
    copy = protect(child(base, 1), w, seed=2)
    found = ancestry(base, copy, w, names=("base", "copy"))
    assert found.relation == "moved copy"
    assert found.aligned is not None
    assert found.aligned.protected
    assert "base and copy share an ancestor, but one was moved" in found.statement
    assert ancestry(base, fresh(name, 9), w).relation == "unrelated"


def test_a_layer_made_anew_is_named() -> None:
    base = fresh("mlp", 1)
    other = child(base, 1) | {"hidden.1.weight": fresh("mlp", 7)["hidden.1.weight"]}
    found = ancestry(base, other, wiring("mlp"))
    assert found.relation == "same ancestor"
    assert found.lost == ("hidden.1.weight",)


def test_without_a_factor_that_moves_nothing_can_be_told() -> None:
    w = wiring("mlp")
    found = ancestry(fresh("mlp", 1), fresh("mlp", 1), w.pinning(list(w.free), "for a test"))
    assert found.relation == "unknown"
    assert "cannot be told" in found.statement


def test_other_shapes_are_named() -> None:
    other = fresh("mlp", 1) | {"hidden.0.weight": torch.zeros(3, 3)}
    with pytest.raises(WiringError, match=r"hidden.0.weight.*\(3, 3\).*\(24, 12\)"):
        ancestry(fresh("mlp", 1), other, wiring("mlp"))


def test_json_holds_plain_values() -> None:
    base = fresh("mlp", 1)
    for other in (child(base, 1), protect(base, wiring("mlp"))):
        told = json.loads(json.dumps(ancestry(base, other, wiring("mlp")).to_json()))
        # The output's bias has no neuron that could be elsewhere.
        assert set(told["blocks"]) == set(base) - {"output.bias"}


@real
def test_fine_tuned_text_generators_share_their_base() -> None:
    base, one, two = (ws.open(p) for p in sorted((SHARED / "textgenrnn").iterdir()))
    w = ws.wiring(base)
    for a, b in ((base, one), (one, two)):
        assert ancestry(a, b, w).log10_p < -20


@real
def test_independent_perceptrons_do_not() -> None:
    a, b = (ws.open(p) for p in checkpoint.list_models(SHARED / "otfusion-mnist" / "mnist_models.zip")[:2])
    found = ancestry(a, b, ws.wiring(a))
    assert found.relation == "unrelated"
    assert found.aligned is not None
    assert found.aligned.nearest > 0.8


@real
def test_symmetry_copies_of_an_image_network_are_moved_copies() -> None:
    files = sorted((SHARED / "inr-orbit").iterdir())[:3]
    first = ws.open(files[0])
    w = ws.wiring(first)
    for file in files[1:]:
        found = ancestry(first, ws.open(file), w)
        assert found.relation == "moved copy"
        assert found.aligned is not None
        assert found.aligned.after < 1e-3

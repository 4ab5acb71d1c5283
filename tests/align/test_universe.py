"""Many networks in one frame."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import weightspace as ws
from tests.align.small import network, noisy
from weightspace.align.universe import Universe
from weightspace.errors import AlignmentError, UnprovedWiringError, WeightspaceError
from weightspace.wiring.proof import distance, run
from weightspace.wiring.wiring import Permutation


def strangers(name: str, count: int, seed: int = 0) -> tuple[ws.Wiring, list[dict[str, Tensor]]]:
    found = [network(name, seed + k) for k in range(count)]
    return found[0][0], [t for _, t, _ in found]


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit"])
def test_planted_permutations_are_found_between_all_pairs(name: str) -> None:
    wiring, tensors, _ = network(name)
    planted = [wiring.random(10 + k) for k in range(4)]
    models = [wiring.apply(p, noisy(tensors, k)) for k, p in enumerate(planted)]
    found = ws.align_many(models, wiring=wiring)
    for i, p in enumerate(planted):
        for j, q in enumerate(planted):
            # j's own order, then i's: what moves j onto i.
            assert q.compose(found.between(i, j)).compose(p.invert()).is_identity
    assert found.objective > 0.98
    for n, t in found.mean().items():
        near = torch.stack([m[n].double() for m in (wiring.apply(planted[0].invert(), models[0]), tensors)])
        assert t.dtype == tensors[n].dtype
        assert float((wiring.apply(planted[0].invert(), {n: t})[n].double() - near.mean(0)).abs().max()) < 0.5


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**5), count=st.integers(2, 4), name=st.sampled_from(["mlp", "cnn"]))
def test_maps_close_around_every_cycle(seed: int, count: int, name: str) -> None:
    wiring, models = strangers(name, count, seed)
    assert wiring.program is not None
    found = ws.align_many(models, wiring=wiring, rounds=3, seed=seed % 5)
    assert found.consistent()
    n = range(count)
    for i, j, k in ((i, j, k) for i in n for j in n for k in n):
        # P_ij P_jk = P_ik on tensors: k onto j and then onto i is k onto i, to the last bit.
        there = wiring.apply(found.between(i, j), wiring.apply(found.between(j, k), models[k]))
        direct = wiring.apply(found.between(i, k), models[k])
        assert all(torch.equal(there[t], direct[t]) for t in direct)
    for model, aligned, p in zip(models, found.aligned, found.permutations, strict=True):
        assert distance(run(wiring.program, model, torch.float64), run(wiring.program, aligned, torch.float64)) < 1e-9
        moved = wiring.apply(p, model)
        assert all(torch.equal(moved[t], aligned[t]) for t in moved)


def test_all_pairs_come_nearer_than_by_a_reference() -> None:
    wiring, models = strangers("mlp", 5)
    found = ws.align_many(models, wiring=wiring)
    assert found.permutations[0].is_identity
    assert found.objective > found.diagnostics["to the reference"] > found.before
    assert "5 networks" in repr(found)
    again = ws.align_many(models, wiring=wiring)
    assert again.objective == found.objective
    more = ws.align_many(models, wiring=wiring, restarts=3)
    assert more.objective >= found.objective
    assert more.permutations[0].is_identity


def test_inconsistent_maps_are_seen() -> None:
    """The check of consistency can fail: maps that do not go through one frame."""
    wiring, models = strangers("mlp", 3)
    found = ws.align_many(models, wiring=wiring, rounds=1)

    class Loose(Universe):
        def between(self, i: int, j: int) -> Permutation:
            return wiring.random(7 * i + j) if i != j else wiring.identity()

    loose = Loose(wiring, found.permutations, 0.0, 0.0, {}, found.aligned)
    assert not loose.consistent()


def test_refusals() -> None:
    wiring, models = strangers("mlp", 2)
    with pytest.raises(AlignmentError, match="two or more"):
        ws.align_many(models[:1], wiring=wiring)
    with pytest.raises(WeightspaceError, match="model 1"):
        ws.align_many([models[0], network("cnn")[1]], wiring=wiring)
    with pytest.raises(UnprovedWiringError):
        ws.align_many(models, wiring=wiring.with_(status="unverified"))

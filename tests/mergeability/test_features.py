"""Features do not see what must not count, and are what they are called."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightspace.errors import WeightspaceError
from weightspace.mergeability.features import MODEL_TERMS, NAMES, PAIR_TERMS, Comparison, compare, term_of

sys.path.insert(0, str(Path(__file__).parent))
from networks import child, fresh, wiring

Tensors = dict[str, Tensor]
SETS = [*combinations(range(3), 2), (0, 1, 2)]


def family(kind: str, seed: int = 0) -> tuple[Tensors, dict[str, Tensors]]:
    base = fresh(kind, seed)
    return base, {f"m{k}": child(base, 10 * seed + k, 0.1 + 0.1 * k) for k in range(3)}


@pytest.mark.parametrize("kind", ["mlp", "cnn", "vit"])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=4, deadline=None)
def test_moving_base_and_models_together_changes_nothing(kind: str, seed: int) -> None:
    base, models = family(kind)
    w = wiring(kind)
    move = w.random(seed)
    before = compare(models, base, w).vectors(SETS)
    after = compare({k: w.apply(move, m) for k, m in models.items()}, w.apply(move, base), w).vectors(SETS)
    assert after == pytest.approx(before, abs=2e-3)


@given(st.permutations(range(3)))
@settings(max_examples=4, deadline=None)
def test_the_order_of_models_does_not_count(order: list[int]) -> None:
    base, models = family("mlp", 1)
    for start in (base, None):
        one = compare(models, start, wiring("mlp"))
        other = compare({f"m{k}": models[f"m{k}"] for k in order}, start, wiring("mlp"))
        where = [order.index(k) for k in range(3)]
        assert other.vectors([[where[i] for i in s] for s in SETS]) == pytest.approx(one.vectors(SETS), abs=1e-6)
    assert one.vector(0, [1, 2]) == pytest.approx(one.vector(0, [2, 1]))


def test_counters_types_and_the_order_of_tensors_do_not_count() -> None:
    base, models = family("cnn", 2)
    before = compare(models, base, wiring("cnn")).vectors(SETS)

    def other(tensors: Tensors, steps: int) -> Tensors:
        found = {n: tensors[n].double() for n in reversed(list(tensors))}
        return {**found, "steps": torch.tensor(steps)}

    after = compare({k: other(m, i) for i, (k, m) in enumerate(models.items())}, other(base, 7), wiring("cnn")).vectors(
        SETS
    )
    assert after == pytest.approx(before, abs=1e-5)


def terms(comparison: Comparison, term: str, i: int, j: int) -> float:
    return float(comparison.pairs[i, j, 0, PAIR_TERMS.index(term)])


def test_terms_are_what_they_are_called() -> None:
    torch.manual_seed(0)
    base = {"w": torch.randn(6, 5)}
    a, b = torch.randn(6, 5), torch.randn(6, 5)
    a[3:] = 0
    found = compare({"a": {"w": base["w"] + a}, "b": {"w": base["w"] + b}}, base)
    assert terms(found, "cosine", 0, 1) == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-5)
    assert terms(found, "projection", 0, 1) == pytest.approx(float((a * b).sum() / a.square().sum()), abs=1e-5)
    rows = a.square().sum(1) / a.square().sum()
    lost = rows @ b.square().sum(1) / (rows @ a.square().sum(1))
    assert terms(found, "disturbance of rows", 0, 1) == pytest.approx(float(lost.log() / 2), abs=1e-4)
    u, _, v = torch.linalg.svd(a)
    within = (u[:, :3].T @ b @ v[:3].T).square().sum() / a.square().sum()
    assert terms(found, "disturbance", 0, 1) == pytest.approx(float(within.log() / 2), abs=1e-3)
    own = found.own[0, 0]
    start = base["w"]
    assert own[MODEL_TERMS.index("base cosine")] == pytest.approx(float((a * start).sum() / a.norm() / start.norm()),
                                                                  abs=1e-5)  # fmt: skip
    assert own[MODEL_TERMS.index("size")] == pytest.approx(float((a.norm() / start.norm()).log()), abs=1e-5)
    even = -(rows[:3] * rows[:3].log()).sum() / np.log(6)
    assert own[MODEL_TERMS.index("rows changed")] == pytest.approx(float(even), abs=1e-5)
    # Symmetric terms are, those that one model sees of another are not.
    k = PAIR_TERMS.index("projection")
    assert found.pairs[..., :k] == pytest.approx(found.pairs[..., :k].transpose(1, 0, 2, 3))
    assert not np.allclose(found.pairs[..., k:], found.pairs[..., k:].transpose(1, 0, 2, 3))


def test_signs_conflict_where_changes_are_opposite() -> None:
    base = {"w": torch.zeros(8, 8)}
    change = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    found = compare({"a": {"w": change}, "same": {"w": 2 * change}, "not": {"w": -change}}, base)
    assert terms(found, "sign conflict", 0, 1) == pytest.approx(0)
    assert terms(found, "sign conflict", 0, 2) == pytest.approx(1)
    assert found.whole[0] == pytest.approx([1, 1, -1])


def test_a_vector_has_a_name_for_every_number_and_any_depth_fits() -> None:
    for kind in ("mlp", "vit"):
        base, models = family(kind)
        found = compare(models, base, wiring(kind)).vectors(SETS)
        assert found.shape == (9, len(NAMES))
        assert np.isfinite(found).all()
    assert len({*NAMES}) == len(NAMES)
    assert {term_of(n) for n in NAMES} >= {"sign conflict", "subspace overlap", "singular interference", "norm ratio",
                                           "misalignment"}  # fmt: skip


def test_models_that_did_not_change_are_no_trouble() -> None:
    base, models = family("mlp")
    found = compare({**models, "base": base}, base, wiring("mlp")).vectors([(0, 3), (3, 1, 2)])
    assert np.isfinite(found).all()


def test_models_that_do_not_fit_are_named() -> None:
    base, models = family("mlp")
    name = next(iter(base))
    with pytest.raises(WeightspaceError, match=r"missing in m1"):
        compare({**models, "m1": {n: t for n, t in models["m1"].items() if n != name}}, base)
    with pytest.raises(WeightspaceError, match=r"has the shape"):
        compare({**models, "m1": {**models["m1"], name: torch.zeros(3, 3)}}, base)
    with pytest.raises(WeightspaceError, match="no models"):
        compare({}, base)

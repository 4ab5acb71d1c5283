"""The learned prior: files, symmetry, intervals, range."""

from __future__ import annotations

import json
import sys
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
import torch

import weightspace
from weightspace.errors import MetanetError
from weightspace.mergeability.features import compare
from weightspace.mergeability.measurements import BARRIER
from weightspace.mergeability.outcome import unlink
from weightspace.mergeability.prior import CARD, FILES, MODEL, STRANGERS, Prior, Spread, shipped, shipped_strangers

sys.path.insert(0, str(Path(__file__).parent))
import small
from networks import wiring


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    prior = small.prior()
    prior.save(tmp_path)
    again = Prior.load(tmp_path)
    base, models = small.family(0)
    comparison = compare(models, base, wiring("mlp"))
    merges = list(combinations(range(4), 2))
    assert again.methods == prior.methods
    assert again.variances == prior.variances
    assert again.cells(comparison, merges) == pytest.approx(prior.cells(comparison, merges), abs=5e-3)
    for method in prior.methods:
        at = np.linspace(0.2, 1, 7)
        assert again.spreads[method].reach(at) == pytest.approx(prior.spreads[method].reach(at), rel=1e-4)


def test_models_may_come_in_any_order() -> None:
    prior = small.prior()
    base, models = small.family(1)
    comparison = compare(models, base, wiring("mlp"))
    for members in ((0, 3), (1, 2, 5)):
        outcomes = [unlink(prior.cells(comparison, [order])).mean(0) for order in permutations(members)]
        assert np.ptp(outcomes, axis=0).max() < 1e-9


def test_terms_say_what_moves_a_prediction() -> None:
    prior = small.prior()
    base, models = small.family(0)
    comparison = compare(models, base, wiring("mlp"))
    terms = prior.terms(comparison, (0, 1), "ties")
    assert {"sign conflict", "norm ratio", "subspace overlap"} <= set(terms)
    assert any(abs(t) > 1e-6 for t in terms.values())


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MetanetError, match="weightspace train merge"):
        Prior.load(tmp_path)
    data = small.prior().save(tmp_path).read_bytes()
    (tmp_path / MODEL).write_bytes(data[: len(data) // 2])
    with pytest.raises(MetanetError, match="cannot be used"):
        Prior.load(tmp_path)
    (tmp_path / MODEL).write_bytes(data.replace(b"sign conflict", b"other feature"))
    with pytest.raises(MetanetError, match="cannot be used"):
        Prior.load(tmp_path)


def test_networks_of_another_kind_are_outside_its_range() -> None:
    prior = small.prior()
    base, models = small.family(0)
    inside = prior.applicability(compare(models, base, wiring("mlp")), (0, 1))
    assert inside.inside, inside
    torch.manual_seed(0)
    far = {k: {n: t + 3 * torch.randn_like(t) for n, t in base.items()} for k in ("a", "b")}
    assert not prior.applicability(compare(far, base, wiring("mlp")), (0, 1)).inside
    assert "no base" in prior.applicability(compare(models, None, wiring("mlp")), (0, 1)).reason
    assert "not proved" in prior.applicability(compare(models, base, wiring("mlp")), (0, 1), proved=False).reason


# -------------------------------------------------------------------- intervals


def test_intervals_hold_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.uniform(0, 1, 4000)
    truth = predicted + (0.01 + 0.2 * (1 - predicted)) * rng.standard_normal(4000)
    fit, test = slice(0, 1000), slice(1000, None)
    spread = Spread.fit(predicted[fit], truth[fit])
    for level in (0.5, 0.8, 0.9):
        inside = np.abs(truth - predicted)[test] <= spread.reach(predicted[test], level)
        assert inside.mean() == pytest.approx(level, abs=0.03)
    # They are as wide as misses are there.
    low, high = predicted[test] < 0.3, predicted[test] > 0.7
    inside = np.abs(truth - predicted)[test] <= spread.reach(predicted[test])
    assert inside[low].mean() == pytest.approx(inside[high].mean(), abs=0.06)
    assert spread.reach(np.array([0.1]))[0] > 2 * spread.reach(np.array([0.9]))[0]


def test_intervals_hold_for_groups_that_were_not_seen() -> None:
    """Misses that depend on the group: taken over groups, intervals hold for new ones on the average."""
    held = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        group = rng.integers(0, 13, 650)
        size = np.exp(0.5 * rng.standard_normal(13))[group]
        predicted = rng.uniform(0, 1, 650)
        truth = predicted + 0.1 * size * rng.standard_normal(650)
        old = group < 12
        spread = Spread.fit(predicted[old], truth[old], [frozenset((int(g),)) for g in group[old]])
        held.append(np.mean(np.abs(truth - predicted)[~old] <= spread.reach(predicted[~old])))
    assert np.mean(held) == pytest.approx(0.9, abs=0.04)


# -------------------------------------------------------------------- what comes with the package


def test_the_shipped_model_is_small_plain_and_described() -> None:
    found = {p.name: p for p in FILES.iterdir()}
    assert set(found) == {MODEL, STRANGERS, CARD}
    assert sum(p.stat().st_size for p in found.values()) < 3_000_000
    assert FILES.is_relative_to(Path(weightspace.__file__).parent)
    for name in (MODEL, STRANGERS):
        data = found[name].read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert "weightspace" in header["__metadata__"]
    card = found[CARD].read_text()
    for section in ("## Learned from", "## On tasks that were held out", "## Limits", "weightspace train merge"):
        assert section in card


def test_the_shipped_model_knows_the_methods_that_score_asks_for() -> None:
    prior = shipped()
    assert {"linear", "task-arithmetic", "ties", BARRIER} <= set(prior.methods)
    assert set(prior.spreads) == set(prior.variances) == set(prior.methods)
    assert prior.base
    strangers = shipped_strangers()
    assert not strangers.base
    assert {"linear", "ot-fusion", "pleas"} == set(strangers.methods)

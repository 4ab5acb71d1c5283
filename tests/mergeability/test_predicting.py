"""What measured merges and inputs change of what is predicted, in the range of the prior and outside."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weightspace.errors import WeightspaceError
from weightspace.mergeability.report import MergeReport

sys.path.insert(0, str(Path(__file__).parent))
import small
from networks import child
from scored import NEW, rows, score


def test_a_measurement_moves_the_others_and_shrinks_their_intervals(
    plain: MergeReport, models: Mapping[str, Any], base: Any
) -> None:
    before = {m.models: m.predictions["ties"] for m in plain.ranked(2)}
    pair = ("m0", "m5")
    low = {"a": "m0", "b": "m5", "method": "ties", "outcome": max(before[pair].value - 0.2, 0.3)}
    after = {m.models: m.predictions["ties"] for m in score(models, base, known=[low]).ranked(2)}
    assert after[pair].measured
    assert after[pair].value == low["outcome"]
    moved: dict[bool, list[float]] = {True: [], False: []}
    for other, p in after.items():
        if other != pair and p.known and before[other].known:
            moved[bool(set(other) & set(pair))].append(before[other].value - p.value)
    assert min(moved[True]) > 0
    # Of merges of other models it says less.
    assert np.mean(moved[True]) > 1.5 * np.mean(moved[False])
    # A measurement that says what was expected moves little, and makes the others surer.
    agreed = {**low, "outcome": before[pair].value}
    told = {m.models: m.predictions["ties"] for m in score(models, base, known=[agreed]).ranked(2)}
    for other, p in told.items():
        if other != pair and p.known and set(other) & set(pair):
            assert p.value == pytest.approx(before[other].value, abs=0.02)
            assert p.high - p.low < before[other].high - before[other].low


def test_measurements_bring_predictions_nearer_to_the_truth(models: Mapping[str, Any], base: Any) -> None:
    truth = {m.models: m.outcome for m in small.measured(NEW) if m.method == "ties"}
    told = rows(("m0", "m5"), ("m1", "m5"), ("m2", "m4"), ("m3", "m5"), ("m0", "m3"))
    rest = [k for k in truth if not any(r["a"] == k[0] and r["b"] == k[1] for r in told)]
    errors = []
    for known in (None, told):
        found = {m.models: m.predictions["ties"].value for m in score(models, base, known=known).ranked(2)}
        errors.append(np.mean([abs(found[k] - truth[k]) for k in rest if not math.isnan(found[k])]))
    assert errors[1] < errors[0]


def test_the_suggestion_is_of_a_pair_that_was_not_measured(models: Mapping[str, Any], base: Any) -> None:
    known: list[dict[str, Any]] = []
    seen = set()
    names = ["m0", "m2", "m4"]
    for _ in range(3):
        told = score({n: models[n] for n in names}, base, known=known).suggest("ties")
        assert told.models not in seen
        assert 0 < told.share <= 1
        seen.add(told.models)
        known += rows(told.models)
    report = score({n: models[n] for n in names}, base, known=known)
    with pytest.raises(WeightspaceError, match=r"every pair was measured by ties"):
        report.suggest("ties")
    with pytest.raises(WeightspaceError, match=r"no predictions by slerp"):
        report.suggest("slerp")


def test_outside_its_range_measured_merges_still_tell_of_others(models: Mapping[str, Any]) -> None:
    truth = {m.models: m.outcome for m in small.measured(NEW) if m.method == "ties"}
    told = rows(("m0", "m5"), ("m1", "m5"), ("m0", "m1"), ("m2", "m5"), ("m0", "m2"), ("m3", "m5"))
    report = score(models, known=told, methods=["ties"])
    found = {m.models: m.predictions["ties"] for m in report.ranked(2)}
    assert all(p.known for p in found.values())
    rest = [k for k in truth if not found[k].measured]
    assert np.mean([abs(found[k].value - truth[k]) for k in rest]) < 0.12
    assert all(found[k].low < found[k].value < found[k].high for k in rest)
    one = {m.models: m.predictions["ties"] for m in score(models, known=told[:1], methods=["ties"]).ranked(2)}
    wide, narrow = (np.mean([p[k].high - p[k].low for k in rest]) for p in (one, found))
    assert narrow < wide


def test_unlabelled_inputs_sharpen_the_prediction(models: Mapping[str, Any], base: Any) -> None:
    pair = {n: models[n] for n in ("m0", "m5")}
    plain = score(pair, base).predictions["ties"]
    inputs = {n: small.data(int(n[1:]), 60, 5)[0] for n in pair}
    with_inputs = score(pair, base, inputs=inputs).predictions["ties"]
    assert with_inputs.value != pytest.approx(plain.value, abs=1e-4)
    assert not with_inputs.measured
    truth = next(m.outcome for m in small.measured(NEW) if m.models == ("m0", "m5") and m.method == "ties")
    assert abs(with_inputs.value - truth) < abs(plain.value - truth) + 0.02
    with pytest.raises(WeightspaceError, match=r"inputs of m0 do not fit the network"):
        score(pair, base, inputs={"m0": torch.zeros(3, 99)})
    with pytest.raises(WeightspaceError, match=r"'m7', which is none of the models"):
        score(pair, base, inputs={"m7": inputs["m0"]})


def test_more_models_than_share_a_posterior_are_ranked(models: Mapping[str, Any], base: Any) -> None:
    many = {f"n{k}": child(models[f"m{k % small.CHILDREN}"], k, 0.01) for k in range(66)}
    report = score(many, base, methods=["ties"])
    assert len(report.ranked(2)) == math.comb(66, 2)
    assert report.top is not None
    assert report.top.models == report.ranked(2)[0].models
    assert report.predictions["ties"].terms
    with pytest.raises(WeightspaceError, match="no predictions"):
        report.suggest()
    asked = score(many, base, methods=["ties"], inputs={"n0": torch.zeros(2, 8)})
    assert any("inputs were not used" in note for note in asked.notes)

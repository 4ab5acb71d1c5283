"""Confidences: what is calibrated, what ships, and that they fall where families are less plain."""

from __future__ import annotations

import json

import numpy as np
import torch

from weightspace.lineage.calibrated import CONFIDENCE, DIRECTION, FILE, REGIMES
from weightspace.lineage.calibration import calibrate
from weightspace.lineage.confidence import FEATURES, WAY, features, probability
from weightspace.lineage.fitting import Known, thinned
from weightspace.lineage.geometry import DEEP, TOP, geometry
from weightspace.lineage.placing import place
from weightspace.lineage.sample import Segment
from weightspace.lineage.tree import OUTSIDE


def walk(size: int, seed: int, star: bool = False, width: int = 600) -> Known:
    """A family whose steps are drawn at random, each from an earlier network."""
    rng = np.random.default_rng(seed)
    parents = [OUTSIDE, *(0 if star else int(rng.integers(i)) for i in range(1, size))]
    values = np.zeros((size, width), dtype=np.float32)
    for b, a in enumerate(parents):
        values[b] = rng.standard_normal(width) if a == OUTSIDE else values[a] + 0.2 * rng.standard_normal(width)
    half = width // 2
    at = torch.arange(half)
    segments = [Segment("one", 0, half, at, True), Segment("two", half, width, at, True)]
    return Known(geometry(values, segments), tuple(parents))


def test_the_shipped_numbers_fit_the_features_and_name_their_command() -> None:
    assert len(CONFIDENCE) == len(FEATURES)
    assert len(DIRECTION) == len(WAY)
    assert all(len(r.weights.deep) == len(DEEP) and len(r.weights.top) == len(TOP) for r in REGIMES)
    assert REGIMES[0].handicap == 0
    assert json.loads(FILE.read_text())["command"].startswith("python tests/benchmarks/lineage.py --calibrate")


def test_plain_families_are_put_in_order_and_told_with_confidence() -> None:
    known = walk(8, 3)
    placed = place(known.geometry)
    assert placed.forest.parents == known.parents
    assert all(p > 0.7 for p in placed.sure.values())
    assert all(p > 0.9 for p in placed.way.values())


def test_where_the_base_is_gone_confidence_falls() -> None:
    whole = walk(12, 5, star=True)
    without = thinned(whole, range(1, 12))
    sure = [p for b, p in place(whole.geometry).sure.items() if whole.parents[b] != OUTSIDE]
    made_up = list(place(without.geometry).sure.values())
    assert np.mean(sure) > 0.7
    assert np.mean([*made_up, 0.0]) < np.mean(sure) - 0.2


def test_calibration_gives_a_model_that_holds_on_other_families() -> None:
    said: list[str] = []
    made, recorded = [walk(5 + i % 3, i) for i in range(10)], [walk(7, 50 + i, star=i % 2 == 0) for i in range(5)]
    found = calibrate(made, recorded, said.append)
    assert [len(r["deep"]) for r in found["regimes"]] == [len(DEEP)] * 3
    assert (len(found["confidence"]), len(found["direction"])) == (len(FEATURES), len(WAY))
    assert any("handicaps" in line for line in said)
    known = walk(9, 99)
    placed = place(known.geometry)
    edge, _ = features(known.geometry, placed.forest, [placed.forest.parents])
    assert len(edge) == 8
    assert probability(edge, found["confidence"]).mean() > 0.5


def test_a_family_without_edges_has_no_confidences() -> None:
    alone = walk(1, 0)
    assert place(alone.geometry).sure == {}


def test_large_families_are_put_in_order_by_the_regime_of_their_parts() -> None:
    known = walk(140, 0, star=True, width=2048)
    placed = place(known.geometry)
    assert np.mean([a == b for a, b in zip(placed.forest.parents, known.parents, strict=True)]) > 0.95
    assert known.geometry.subset(range(140)) is known.geometry

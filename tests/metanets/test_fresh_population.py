"""Testing on a fresh population: everything else is trained with, and nothing of it may be in both."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_geometric")

from tests.benchmarks.metanet_accuracy import FRESH, dealt, no_overlap
from weightspace.metanets import Sample

from .references import network


def samples(seeds: range, plan: int) -> list[Sample]:
    return [
        Sample(f"{s}-{e}", network("mlp", 2 * s + e), {"plan": {"seed": plan + s}}, f"run {s}")
        for s in seeds
        for e in range(2)
    ]


def test_all_of_the_fresh_population_is_tested_on() -> None:
    own, fresh = samples(range(20), 0), samples(range(20, 30), 0)
    no_overlap(own, fresh)
    parts = dealt(own, fresh, 0)
    assert parts.tests == {FRESH: fresh}
    assert len(parts.train) + len(parts.validation) == len(own)
    assert not {s.group for s in parts.train} & {s.group for s in parts.validation}
    assert [s.name for s in dealt(own, fresh, 1).validation] != [s.name for s in parts.validation]
    assert {s.group for s in dealt(own, None, 0).tests["unseen runs"]} < {s.group for s in own}


def test_what_is_in_both_is_refused() -> None:
    own = samples(range(4), 0)
    with pytest.raises(SystemExit, match="1 runs and 0 networks"):
        no_overlap(own, samples(range(10, 12), -7))
    with pytest.raises(SystemExit, match="0 runs and 2 networks"):
        no_overlap(own, samples(range(3, 5), 100))

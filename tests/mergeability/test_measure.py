"""Measuring merges: what is written is what the merge does, and it goes on where it stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor

import weightspace as ws
from weightspace.mergeability.measure import (
    Family,
    measure,
    measurements,
    pairs_of,
    read_rows,
    sets_of,
)
from weightspace.mergeability.measurements import BARRIER

sys.path.insert(0, str(Path(__file__).parent))
import small


def family(number: int = 0) -> Family:
    base, models = small.family(number)

    def evaluate(tensors: Mapping[str, Tensor], name: str) -> float:
        return small.accuracy(tensors, int(name[1:]))

    return Family(f"base-{number}", base, models, evaluate, {m: (m[1:],) for m in models})


def test_a_row_tells_what_the_merged_network_retains() -> None:
    one = family()
    row = next(measure(one, [("m1", "m3")], ["task-arithmetic"]))
    merged = ws.merge([one.models["m1"], one.models["m3"]], "task-arithmetic", base=one.base).tensors
    assert merged is not None
    wanted = [small.accuracy(merged, t) / small.accuracy(one.models[f"m{t}"], t) for t in (1, 3)]
    assert row["retained"] == pytest.approx(wanted)
    assert row["outcome"] == pytest.approx(sum(wanted) / 2)
    assert row["tasks"] == [["1"], ["3"]]


def test_the_barrier_is_lost_accuracy_half_way() -> None:
    one = family()
    row = next(measure(one, [("m0", "m2")], ["linear"]))
    a, b = one.models["m0"], one.models["m2"]
    middle = {n: (a[n] + b[n]) / 2 for n in a}
    ends = sum(small.accuracy(x, t) for x in (a, b) for t in (0, 2)) / 4
    assert row[BARRIER] == pytest.approx(ends - sum(small.accuracy(middle, t) for t in (0, 2)) / 2)
    found = measurements([row])
    assert [m.method for m in found] == ["linear", BARRIER]
    assert BARRIER not in next(measure(one, [("m0", "m1", "m2")], ["linear"]))


def test_a_line_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = next(measure(family(), [("m0", "m1")], ["linear"]))
    path.write_text(json.dumps(row) + "\n" + json.dumps(row)[:40])
    assert read_rows(path) == [row]


def test_sets_are_different_ones_and_the_same_every_time() -> None:
    names = [f"m{i}" for i in range(8)]
    pairs = sets_of(names, 2, 20)
    assert len(pairs) == len(set(pairs)) == 20
    assert pairs == sets_of(names[::-1], 2, 20)
    triples = sets_of(names, 3, 10, seed=1)
    assert len({frozenset(t) for t in triples}) == 10
    assert all(len(set(t)) == 3 for t in triples)
    assert len(sets_of(names[:3], 3, 10)) == 1


def test_pairs_of_two_families_have_some_with_the_same_tasks() -> None:
    one, other = family(0), family(1)
    pairs = pairs_of(one, other, 16)
    assert len(set(pairs)) == 16
    alike = sum(one.tasks[a] == other.tasks[b] for a, b in pairs)
    assert 4 <= alike < 16

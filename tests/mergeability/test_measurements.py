"""Measured merges: read from anywhere, refused where they make no sense, and of other models left out."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from weightspace.errors import WeightspaceError
from weightspace.mergeability.measurements import (
    BARRIER,
    Measurement,
    as_measurement,
    latest,
    read_measurements,
    write_measurements,
)

sys.path.insert(0, str(Path(__file__).parent))
import small
from scored import NEW, score


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "frame", "rows", "measurements"])
def test_known_may_come_from_anywhere(kind: str, tmp_path: Path) -> None:
    told = [m for m in small.measured(NEW) if m.method in ("ties", BARRIER)][:6]
    path = tmp_path / f"known.{kind}"
    known: Any = path
    if kind in ("csv", "json"):
        write_measurements(path, told)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(m.to_row()) + "\n" for m in told))
    elif kind == "frame":
        known = pd.DataFrame([m.to_row() for m in told])
    else:
        known = told if kind == "measurements" else [m.to_row() for m in told]
    found = read_measurements(known)
    assert [(m.models, m.method) for m in found] == [(m.models, m.method) for m in told]
    assert [m.outcome for m in found] == pytest.approx([m.outcome for m in told])
    assert all(len(m.retained) == (0 if m.method == BARRIER else 2) for m in found)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": "x", "b": "y", "method": "ties", "outcome": 87.3}, r"row 1.*87.3.*if it is percent, write 0.873"),
        ({"a": "x", "b": "y", "method": "ties", "outcome": -0.1}, r"outcome -0.1, expected a share"),
        ({"a": "x", "b": "y", "method": "ties", "outcome": 870}, r"870, expected a share"),
        ({"a": "x", "b": "y", "method": BARRIER, "outcome": 12.0}, r"accuracy that is lost.*write 0.12"),
        ({"a": "x", "b": "y", "method": "ties", "outcome": "good"}, r"'good' is no number"),
        ({"a": "x", "b": "y", "method": "ties", "outcome": float("nan")}, r"there is no outcome"),
        ({"a": "x", "b": "y", "method": "ties", "outcome": float("inf")}, r"not a finite number"),
        ({"a": "x", "b": "y", "method": "ties"}, r"there is no outcome.*a, b, method and outcome"),
        ({"a": "x", "b": "y", "outcome": 0.9}, r"there is no method"),
        ({"method": "ties", "outcome": 0.9}, r"there are no models"),
        ({"a": "x", "method": "ties", "outcome": 0.9}, r"2 to 8 different ones were expected"),
        ({"a": "x", "b": "x", "method": "ties", "outcome": 0.9}, r"2 to 8 different ones were expected"),
        ({"a": "x", "b": "y", "method": "ties", "outcome": 0.9, "outcome_a": 0.9}, r"by task are missing"),
        (
            {"a": "x", "b": "y", "method": "ties", "outcome": 0.9, "outcome_a": 0.5, "outcome_b": 0.6},
            r"0.9 is not the mean of the outcomes by task \(0.5, 0.6\)",
        ),
        ("ties", r"found 'ties', expected a row"),
    ],
)
def test_rows_that_make_no_sense_are_refused(row: Any, message: str) -> None:
    with pytest.raises(WeightspaceError, match=message):
        read_measurements([row])


def test_files_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for name, text in (("a.json", "{"), ("a.csv", "\x00"), ("b.json", '{"a": 1}'), ("c.csv", "model,score\nx,0.9\n")):
        path = tmp_path / name
        path.write_text(text)
        if name == "a.csv":
            path.write_bytes(b"\xff\xfe\x00\x01\xff")
        with pytest.raises(WeightspaceError, match=r"expected"):
            read_measurements(path)
    with pytest.raises(WeightspaceError, match=r"cannot be read"):
        read_measurements(tmp_path / "absent.csv")


def test_the_last_measurement_of_a_merge_counts() -> None:
    one, two = Measurement(("x", "y"), "ties", 0.9), Measurement(("y", "x"), "ties", 0.8)
    assert latest([one, two]) == (two,)
    assert as_measurement(two) is two


def test_known_merges_of_other_models_are_said_to_be_left_out(models: Mapping[str, Any], base: Any) -> None:
    foreign = [
        {"a": "x", "b": "m0", "method": "ties", "outcome": 0.9},
        {"a": "m0", "b": "m1", "method": "moe", "outcome": 0.9},
    ]
    report = score({n: models[n] for n in ("m0", "m1")}, base, known=foreign)
    assert report.known == ()
    assert any("1 measured merges are about models that were not given" in n for n in report.notes)
    assert any("nothing was learned about moe" in n for n in report.notes)

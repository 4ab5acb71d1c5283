"""What the metanet benchmarks share: methods trained on the same splits, a resumable file of results, tables.

Every result is a row of JSON in a file, written as soon as it is there: an interrupted comparison goes on where
it stopped, and one run later with another method adds its rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from weightspace.metanets.data import Sample
from weightspace.metanets.metrics import over_seeds

Row = dict[str, Any]
Values = dict[str, float]

# Ours, and the published ones at sizes that a CPU can train: a quarter to half of the width, a layer less than in the
# papers.
OURS: dict[str, dict[str, Any]] = {
    "ours": {"kind": "operator", "width": 64},
    "ours, scale": {"kind": "operator", "width": 64, "scale": True},
}
# The same help for all: what the networks answer to noise. Half of the width, since the read-out sees more.
ANSWERING: dict[str, dict[str, Any]] = {
    "ours, answers": {"kind": "operator", "width": 32, "dropout": 0.2, "answers": True},
}
REFERENCES: dict[str, dict[str, Any]] = {
    "neural-graphs": {"kind": "neural-graphs", "hidden": 24, "layers": 3, "fourier": 16},
    "gmn": {"kind": "gmn", "hidden": 24, "layers": 3},
    "scalegmn": {"kind": "scalegmn", "hidden": 24, "layers": 3, "direction": "forward"},
    "scalegmn, both": {"kind": "scalegmn", "hidden": 24, "layers": 3, "direction": "both"},
}
ANSWERING |= {f"{name}, answers": {**config, "dropout": 0.2, "answers": True} for name, config in REFERENCES.items()}
# And learned images beside the noise; all networks of a population do one task.
ANSWERING |= {f"{name} and questions": {**config, "questions": 32} for name, config in ANSWERING.items()}


@dataclass(frozen=True)
class Split:
    """Samples to train on, to choose the epoch by, and named sets to test on."""

    train: Sequence[Sample]
    validation: Sequence[Sample]
    tests: Mapping[str, Sequence[Sample]]


@dataclass
class Results:
    """Rows in a JSON-lines file; without a file they are kept in memory."""

    path: Path | None = None
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.is_file():
            self.rows = [json.loads(line) for line in self.path.read_text().splitlines() if line.strip()]

    def find(self, **key: Any) -> list[Row]:
        return [r for r in self.rows if all(r.get(k) == v for k, v in key.items())]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def parser(doc: str | None, recipe: str) -> argparse.ArgumentParser:
    """The options that all comparisons on a population have; ``recipe`` is what it is built from."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("zoo", type=Path, help=f"folder made by `weightspace zoo build {recipe}`")
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--epochs", type=int, default=20)
    found.add_argument("--methods", nargs="*", help="only methods whose name contains one of these")
    found.add_argument("--skip", nargs="*", default=[], help="leave out methods whose name contains one of these")
    found.add_argument("--results", type=Path, help="JSON-lines file to add to and go on from")
    return found


def wanted(name: str, methods: Sequence[str] | None, skip: Sequence[str] = ()) -> bool:
    """Is a method among those that were asked for?"""
    return (not methods or any(m in name for m in methods)) and not any(m in name for m in skip)


def run_metanet(
    name: str,
    config: Mapping[str, Any],
    split: Split,
    seed: int,
    score: Callable[[torch.Tensor, Sequence[Sample]], Values],
    results: Results,
    key: Row,
    **plan: Any,
) -> None:
    """Train one metanet on a split and add a row per test set, unless the rows are there."""
    from weightspace.metanets.training import TrainingPlan, fit

    if len(results.find(**key, method=name, seed=seed)) >= len(split.tests):
        return
    started = time.perf_counter()
    trained = fit(
        TrainingPlan(metanet=dict(config), seed=seed, **plan), split.train, split.validation, progress=False
    )
    seconds = time.perf_counter() - started
    parameters = sum(p.numel() for p in trained.metanet.parameters())
    # Where the last epoch is the best one, more might have helped.
    losses = [row["validation_loss"] for row in trained.history if "validation_loss" in row]
    best = 1 + losses.index(min(losses)) if losses else len(trained.history)
    for test, samples in split.tests.items():
        values = score(trained.predict(samples), samples)
        results.add({
            **key, "method": name, "seed": seed, "test": test, **values, "epochs": len(trained.history),
            "best_epoch": best, "seconds": seconds, "parameters": parameters,
            "train": len(split.train), "count": len(samples),
        })  # fmt: skip


def table(rows: Sequence[Row], columns: Sequence[str], by: Sequence[str] = ("method",)) -> str:
    """A Markdown table: a line per value of ``by``, means over seeds with 95 % intervals."""
    keys = list(dict.fromkeys(tuple(r[k] for k in by) for r in rows))
    lines = [" | ".join([*by, *columns, "seeds"]), " | ".join(["---"] * (len(by) + len(columns) + 1))]
    for k in keys:
        own = [r for r in rows if tuple(r[c] for c in by) == k]
        cells = []
        for column in columns:
            values = [r[column] for r in own if r.get(column) is not None]
            cells.append("" if not values else show(values))
        lines.append(" | ".join([*map(str, k), *cells, str(len({r["seed"] for r in own}))]))
    return "\n".join(lines)


def show(values: Sequence[float]) -> str:
    """A mean, with its 95 % interval over seeds where there are several."""
    mean = sum(values) / len(values)
    digits = 3 if abs(mean) < 10 else 0
    if len(values) == 1 or min(values) == max(values):
        return f"{mean:,.{digits}f}"
    found = over_seeds(values)
    return f"{mean:.{digits}f} ± {(found.high - found.low) / 2:.{digits}f}"

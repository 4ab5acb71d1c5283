"""Scoring candidates before merging them: what is predicted of twelve unseen networks, beside what merging them gave.

    python tests/benchmarks/score_candidates.py                       # trains the networks first (about a minute)
    python tests/benchmarks/score_candidates.py --zoo models/candidates --results candidates.jsonl

Children of one base (``candidates.toml``) on tasks that the merge-ability model was not learned from. All pairs are
scored from the files alone, then merged by every method and evaluated on 500 test images of each model's own task.

First table: the most and the least promising pairs by the method that is expected best for them, retained accuracy in
percent. Second table: over all pairs, Spearman's rank correlation of expectation and measurement, the mean error in
points, the share of 90 % intervals that hold, and what is lost (points) by taking the pair, or for every pair the
method, that is expected best instead of the one that is. Third table: the pair that ``suggest()`` names is measured and
told, again and again; error, width of the intervals and their coverage on the pairs that are left, by that method.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from scipy.stats import spearmanr

import weightspace as ws
from weightspace.mergeability.measure import families, measure, measurements
from weightspace.mergeability.measurements import BARRIER, Measurement
from weightspace.mergeability.report import MergeReport
from weightspace.zoo.train import build_zoo

RECIPE = Path(__file__).with_name("candidates.toml")
Truth = Mapping[tuple[frozenset[str], str], Measurement]
Row = dict[str, Any]


def extremes(report: MergeReport, truth: Truth, most: int = 4) -> list[Row]:
    """The first and the last of the ranking."""
    ranked = [m for m in report.ranked(2) if m.best]
    rows = []
    for place, m in [(i, m) for i, m in enumerate(ranked, 1) if i <= most or i > len(ranked) - most]:
        assert m.best is not None
        p, measured = m.predictions[m.best], truth[frozenset(m.models), m.best]
        rows.append({
            "table": "pairs", "rank": place, "models": " + ".join(Path(n).stem.removesuffix("-e004") for n in m.models),
            "by": m.best, "expected": f"{100 * p.value:.1f}", "interval": f"{100 * p.low:.1f} to {100 * p.high:.1f}",
            "measured": f"{100 * measured.outcome:.1f}",
        })  # fmt: skip
    return rows


def summary(report: MergeReport, truth: Truth) -> list[Row]:
    """How good expectations are, by method; and what choosing by them costs."""
    rows = []
    pairs = [m for m in report.ranked(2) if m.best]
    methods = [m for m in pairs[0].predictions if m != BARRIER]
    for method in methods:
        p = [m.predictions[method] for m in pairs]
        y = np.array([truth[frozenset(m.models), method].outcome for m in pairs])
        said = np.array([x.value for x in p])
        held = np.mean([x.low <= t <= x.high for x, t in zip(p, y, strict=True)])
        rows.append({
            "table": "methods", "method": method, "pairs": len(pairs),
            "rank correlation": f"{spearmanr(said, y)[0]:.2f}",
            "error": f"{100 * np.abs(said - y).mean():.1f}", "intervals that hold": f"{held:.0%}",
            "best pair's loss": f"{100 * (y.max() - y[said.argmax()]):.1f}",
        })  # fmt: skip
    every = np.array([[truth[frozenset(m.models), x].outcome for x in methods] for m in pairs])
    chosen = np.array([methods.index(str(m.best)) for m in pairs])
    lost = every.max(1) - every[np.arange(len(pairs)), chosen]
    fixed = {x: 100 * float((every.max(1) - every[:, k]).mean()) for k, x in enumerate(methods)}
    rows.append({
        "table": "choice", "method by score": f"{100 * lost.mean():.2f}",
        **{f"always {x}": f"{value:.2f}" for x, value in fixed.items()},
    })  # fmt: skip
    return rows


def sharpened(zoo: Path, base: Path, method: str, truth: Truth, steps: int) -> list[Row]:
    """Error and intervals as suggested pairs are measured."""
    known: list[Measurement] = []
    rows = []
    for step in range(steps + 1):
        report = ws.score(zoo, base, [method], known, checks=False)
        told = {frozenset(m.models) for m in known}
        left = [m for m in report.ranked(2) if m.best and frozenset(m.models) not in told]
        p = [m.predictions[method] for m in left]
        y = [truth[frozenset(m.models), method].outcome for m in left]
        error = np.mean([abs(x.value - t) for x, t in zip(p, y, strict=True)])
        rows.append({
            "table": "sharpened", "measured": step, "pairs left": len(left), "error": f"{100 * error:.1f}",
            "width": f"{100 * np.mean([x.high - x.low for x in p]):.1f}",
            "intervals that hold": f"{np.mean([x.low <= t <= x.high for x, t in zip(p, y, strict=True)]):.0%}",
            "rank correlation": f"{spearmanr([x.value for x in p], y)[0]:.2f}",
        })  # fmt: skip
        known.append(truth[frozenset(report.suggest(method).models), method])
    return rows


def table(rows: list[Row]) -> str:
    names = [k for k in rows[0] if k != "table"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(str(r[k]) for k in names) + " |" for r in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, default=Path("models/candidates"), help="folder of the networks")
    parser.add_argument("--steps", type=int, default=10, help="measurements that are told one after the other")
    parser.add_argument("--json", action="store_true", help="a line of JSON for every row")
    parser.add_argument("--results", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    build_zoo(RECIPE, options.zoo, progress=not options.json)
    base = next(options.zoo.glob("base-*.safetensors"))
    report = ws.score(options.zoo, base)
    found = next(f for f in families(options.zoo) if f.name == base.name)
    methods = [m for m in report.predictions if m != BARRIER]
    told = measurements(measure(found, [m.models for m in report.ranked(2)], methods))
    truth = {(frozenset(m.models), m.method): m for m in told}
    rows = [*extremes(report, truth), *summary(report, truth)]
    rows += sharpened(options.zoo, base, "ties" if "ties" in methods else methods[0], truth, options.steps)
    if options.results:
        with options.results.open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    if options.json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    print(f"{report.verdict}\n")
    for name in dict.fromkeys(r["table"] for r in rows):
        print(table([r for r in rows if r["table"] == name]), end="\n\n")


if __name__ == "__main__":
    main()

"""One metanet for all architectures: ``python tests/benchmarks/metanet_mixed.py ZOO``.

Trains one metanet to predict the test accuracy of perceptrons, CNNs, residual networks, vision transformers and GPTs
together (``weightspace zoo build mixed``; 65 % of the runs of each family, 10 % to choose the epoch by) and tests on
the other runs of each family. Then leaves each family out of the training as a whole and tests on it. Kendall's τ
within each family (R² over all of them), with 95 % intervals over seeds, beside flat statistics of all tensors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.comparison import (
    ANSWERING,
    OURS,
    REFERENCES,
    Results,
    Row,
    Split,
    parser,
    run_metanet,
    show,
    table,
    wanted,
)
from tests.benchmarks.metanet_accuracy import run_flat, scores
from weightspace.metanets.data import Sample, load_samples, split

FLAT: dict[str, dict[str, object]] = {
    "statistics + ridge": {"kind": "ridge"},
    "statistics + boosting": {"kind": "boosting"},
    "statistics and answers + boosting": {"kind": "boosting", "answers": True},
}


def main() -> None:
    """Train on all families, then without each."""
    arguments = parser(__doc__, "mixed")
    arguments.add_argument("--without", nargs="*", help="families to leave out in turn (default: each)")
    options = arguments.parse_args()
    samples = load_samples(options.zoo)
    print(samples, flush=True)
    families = sorted({s.record["population"] for s in samples})
    results = Results(options.results)
    for seed in range(options.seeds):
        train: list[Sample] = []
        validation: list[Sample] = []
        tests: dict[str, Sequence[Sample]] = {}
        for family in families:
            own = [s for s in samples if s.record["population"] == family]
            first, second, third = split(own, (0.65, 0.1, 0.25), seed)
            train, validation, tests[family] = [*train, *first], [*validation, *second], third
        everything = [s for t in tests.values() for s in t]
        run(Split(train, validation, {**tests, "all": everything}), "", seed, options, results)
        for family in families if options.without is None else options.without:
            kept = [[s for s in part if s.record["population"] != family] for part in (train, validation)]
            unseen = [s for s in samples if s.record["population"] == family]
            run(Split(kept[0], kept[1], {family: unseen}), family, seed, options, results)
    print("\ntau within each family, trained on all of them and (left out) on the others\n")
    print(by_family(results.rows, families))
    print("\ntrained on all families, tested on other runs\n")
    print(table(results.find(without=""), ("tau", "r2", "mae", "seconds"), ("method", "test")))
    print("\ntrained without the family that is tested on\n")
    left = [r for r in results.rows if r["without"]]
    print(table(left, ("tau", "r2", "mae"), ("method", "test")))


def by_family(rows: Sequence[Row], families: Sequence[str]) -> str:
    """A Markdown table of τ: a line per method, a column per family; empty where it was not run."""
    columns = [*families, "all"]
    lines = [" | ".join(["method", *columns, "seeds"]), " | ".join(["---"] * (len(columns) + 2))]
    for method, out in dict.fromkeys((r["method"], bool(r["without"])) for r in rows):
        own = [r for r in rows if r["method"] == method and bool(r["without"]) == out]
        cells = [[r["tau"] for r in own if r["test"] == c] for c in columns]
        seeds = str(len({r["seed"] for r in own}))
        name = f"{method}, family left out" if out else method
        lines.append(" | ".join([name, *(show(c) if c else "" for c in cells), seeds]))
    return "\n".join(lines)


def run(parts: Split, without: str, seed: int, options: argparse.Namespace, results: Results) -> None:
    """Every method on one split."""
    key = {"without": without}
    for name, config in {**OURS, **REFERENCES, **ANSWERING}.items():
        if wanted(name, options.methods, options.skip):
            run_metanet(
                name, config, parts, seed, scores("test_accuracy"), results, key, target="test_accuracy",
                epochs=options.epochs, batch=32, average=0.98,
            )  # fmt: skip
    for name, kind in FLAT.items():
        if wanted(name, options.methods, options.skip):
            run_flat(name, {**kind, "activation": True}, parts, "test_accuracy", seed, results, key)


if __name__ == "__main__":
    main()

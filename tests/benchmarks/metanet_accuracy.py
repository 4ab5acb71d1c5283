"""Predicting the test accuracy of networks from their weights: ``python tests/benchmarks/metanet_accuracy.py ZOO …``.

For every population (a folder made by ``weightspace zoo build``) and every seed the training runs are dealt anew into
65 % to train on, 10 % to choose the epoch by and 25 % to test on; all checkpoints of a run go together. Every method
trains on the same networks for the same number of epochs. Flat baselines get the validation networks too. Rows with
"answers" also hear what the networks answer to noise (``weightspace.metanets.answers``).

``--fresh FOLDER`` tests on another population instead: 90 % of the runs of the one population to train on, 10 % to
choose the epoch by, dealt anew for every seed, and all networks of FOLDER to test on (``wild_park_fresh.toml`` draws
those of ``zoo/wild-park-mnist.toml`` anew). Refused where a network of FOLDER is among those of the population.

Prints Kendall's τ, R² and the mean absolute error on the test networks, with 95 % intervals over seeds, beside
chance (the mean of the training set).

Published, each on its own zoo with 20 to 30 thousand networks (here there are several hundred): on CIFAR-10-GS StatNN
τ 0.915, NG-T 0.935, GMN 0.938, ScaleGMN 0.941; on the CNN wild park NG-T 0.817, DNG 0.874.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from tests.benchmarks.comparison import (
    ANSWERING,
    OURS,
    REFERENCES,
    Results,
    Row,
    Split,
    Values,
    run_metanet,
    table,
    wanted,
)
from weightspace.metanets.data import Sample, load_samples, split
from weightspace.metanets.flat import FlatBaseline
from weightspace.metanets.metrics import kendall_tau, mean_absolute_error, r_squared

FLAT = {
    "StatNN (boosting)": {"kind": "stat-boosting"},
    "StatNN (network)": {"kind": "stat-nn"},
    "statistics + ridge": {"kind": "ridge"},
    "statistics + boosting": {"kind": "boosting"},
    "statistics + boosting, activation known": {"kind": "boosting", "activation": True},
    "statistics and answers + boosting": {"kind": "boosting", "activation": True, "answers": True},
    "raw weights": {"kind": "raw"},
}
FRESH = "fresh population"
COLUMNS = ("tau", "r2", "mae", "seconds", "parameters")


def main() -> None:
    """Run what is asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoos", nargs="+", type=Path, help="folders of populations")
    parser.add_argument("--fresh", type=Path, metavar="FOLDER", help="train on all runs of ZOO, test on these networks")
    parser.add_argument("--target", default="test_accuracy", help="field of the record")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--methods", nargs="*", help="only methods whose name contains one of these")
    parser.add_argument("--skip", nargs="*", default=[], help="leave out methods whose name contains one of these")
    parser.add_argument("--results", type=Path, help="JSON-lines file to add to and go on from")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.results)
    if options.fresh and len(options.zoos) > 1:
        parser.error("--fresh takes one population to train on")
    fresh = load_samples(options.fresh) if options.fresh else None
    for zoo in options.zoos:
        compare(zoo, options.target, options.seeds, options.epochs, options.methods, options.skip, results, fresh)
    for zoo in options.zoos:
        own = results.find(zoo=zoo.name, test="unseen runs" if fresh is None else FRESH)
        if own:
            print(f"\n{zoo.name}: {own[0]['train']} networks to train on, {own[0]['count']} to test on\n")
            print(table(own, COLUMNS))


def compare(
    zoo: Path, target: str, seeds: int, epochs: int, methods: Sequence[str] | None, skip: Sequence[str],
    results: Results, fresh: Sequence[Sample] | None = None,
) -> None:  # fmt: skip
    """Every method on every seed's split of one population; with ``fresh`` all of these are tested on."""
    samples = load_samples(zoo)
    print(f"{zoo.name}: {samples!r}", flush=True)
    if fresh is not None:
        print(f"to test on: {fresh!r}", flush=True)
        no_overlap(samples, fresh)
    for seed in range(seeds):
        parts = dealt(samples, fresh, seed)
        for name, options in FLAT.items():
            if wanted(name, methods, skip):
                run_flat(name, options, parts, target, seed, results, {"zoo": zoo.name})
        if wanted("chance", methods, skip):
            chance(parts, target, seed, results, zoo.name)
        for name, config in {**OURS, **REFERENCES, **ANSWERING}.items():
            if wanted(name, methods, skip):
                run_metanet(
                    name, config, parts, seed, scores(target), results, {"zoo": zoo.name}, target=target, epochs=epochs,
                    batch=32, average=0.98,
                )  # fmt: skip


def dealt(samples: Sequence[Sample], fresh: Sequence[Sample] | None, seed: int) -> Split:
    """A seed's split: 65, 10 and 25 % of the runs, or 90 and 10 % of them and a fresh population to test on."""
    if fresh is not None:
        train, validation = split(samples, (0.9, 0.1), seed)
        return Split(train, validation, {FRESH: fresh})
    train, validation, test = split(samples, (0.65, 0.1, 0.25), seed)
    return Split(train, validation, {"unseen runs": test})


def no_overlap(samples: Sequence[Sample], fresh: Sequence[Sample]) -> None:
    """Refuse a population to test on that shares a run's seed or a network with the one to train on."""

    def weights(sample: Sample) -> bytes:
        tensors = (sample.graph.tensor(name) for name in sorted(sample.graph.shapes))
        return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).digest()

    seeds = [{s.record["plan"]["seed"] for s in part} for part in (samples, fresh)]
    common = [{weights(s) for s in part} for part in (samples, fresh)]
    if seeds[0] & seeds[1] or common[0] & common[1]:
        raise SystemExit(
            f"{len(seeds[0] & seeds[1])} runs and {len(common[0] & common[1])} networks are in both populations; "
            "build the one to test on from a recipe of another name"
        )


def scores(target: str):  # type: ignore[no-untyped-def]
    """A function from predictions and samples to the figures of the table."""

    def score(predicted: torch.Tensor, samples: Sequence[Sample]) -> Values:
        return figures(truth(samples, target), predicted.numpy())

    return score


def truth(samples: Sequence[Sample], target: str) -> np.ndarray:
    return np.array([float(s.record[target]) for s in samples])


def figures(y: np.ndarray, p: np.ndarray) -> Values:
    return {"tau": kendall_tau(y, p), "r2": r_squared(y, p), "mae": mean_absolute_error(y, p)}


def run_flat(
    name: str, options: dict[str, object], parts: Split, target: str, seed: int, results: Results, key: Row
) -> None:
    """One flat baseline on one split."""
    if len(results.find(**key, method=name, seed=seed)) >= len(parts.tests):
        return
    train = [*parts.train, *parts.validation]
    started = time.perf_counter()
    try:
        fitted = FlatBaseline(**options, seed=seed).fit(train, truth(train, target))  # type: ignore[arg-type]
    except Exception as error:
        print(f"{name}: {error}", flush=True)
        return
    seconds = time.perf_counter() - started
    for test, samples in parts.tests.items():
        values = figures(truth(samples, target), fitted.predict(samples))
        results.add({
            **key, "method": name, "seed": seed, "test": test, **values, "seconds": seconds,
            "train": len(parts.train), "count": len(samples),
        })  # fmt: skip


def chance(parts: Split, target: str, seed: int, results: Results, zoo: str) -> None:
    """The mean of the training set for everything."""
    if results.find(zoo=zoo, method="chance", seed=seed):
        return
    mean = truth(parts.train, target).mean()
    for test, samples in parts.tests.items():
        values = figures(truth(samples, target), np.full(len(samples), mean))
        results.add({
            "zoo": zoo, "method": "chance", "seed": seed, "test": test, **values, "train": len(parts.train),
            "count": len(samples),
        })  # fmt: skip


if __name__ == "__main__":
    main()

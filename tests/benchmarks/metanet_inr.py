"""Which digit does a SIREN show? ``python tests/benchmarks/metanet_inr.py ZOO``.

Classifies networks that each hold one MNIST image (``weightspace zoo build inr``) by their weights: those of images of
MNIST's training set are trained on (10 % to choose the epoch by), those of its test images tested on. All methods have
the same networks, epochs and dropout, and those with "probes" in their name 64 learned inputs that are followed through
the network, as ours has them. Accuracy with 95 % intervals over seeds; chance is the largest class.

Published on another, larger set of MNIST SIRENs (60,000): DWS 85.7, NG-GNN 91.4, ScaleGMN 96.6, INR2JLS 98.6.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from tests.benchmarks.comparison import REFERENCES, Results, Split, Values, parser, run_metanet, table, wanted
from weightspace.metanets.data import Sample, load_samples, split
from weightspace.metanets.flat import FlatBaseline

OURS = {
    "ours": {"kind": "operator", "width": 64, "probes": 64},
    "ours, scale": {"kind": "operator", "width": 64, "probes": 64, "scale": True},
    "ours, no probes": {"kind": "operator", "width": 64, "probes": 0},
}
PROBED = {f"{name}, probes": {**config, "probes": 64} for name, config in REFERENCES.items() if name != "scalegmn"}
FLAT = ("stat-nn", "stat-boosting", "raw")


def main() -> None:
    """Train every method, print the table."""
    options = parser(__doc__, "inr").parse_args()
    samples = load_samples(options.zoo)
    print(samples, flush=True)
    fitting = [s for s in samples if s.record["population"] == "siren-train"]
    test = [s for s in samples if s.record["population"] == "siren-test"]
    results = Results(options.results)
    for seed in range(options.seeds):
        train, validation = split(fitting, (0.9, 0.1), seed)
        parts = Split(train, validation, {"test images": test})
        for kind in FLAT:
            if wanted(kind, options.methods, options.skip):
                flat(kind, parts, seed, results)
        for name, config in {**OURS, **PROBED, **REFERENCES}.items():
            if wanted(name, options.methods, options.skip):
                classes = sorted({s.record["label"] for s in samples})
                run_metanet(
                    name, {**config, "dropout": 0.3}, parts, seed, lambda p, s, c=classes: score(p, s, c), results, {},
                    task="classification", target="label", epochs=options.epochs, batch=64, average=0.98,
                )  # fmt: skip
    most = Counter(s.record["label"] for s in test).most_common(1)[0][1] / len(test)
    print(f"\n{len(fitting)} networks to train on, {len(test)} to test on; the largest class is {most:.1%} of these\n")
    print(table(results.rows, ("accuracy", "cross_entropy", "seconds", "parameters")))


def score(probabilities: torch.Tensor, samples: list[Sample], classes: list[int]) -> Values:
    """Accuracy and cross-entropy of class probabilities ``(n, classes)``."""
    truth = torch.tensor([classes.index(s.record["label"]) for s in samples])
    chosen = probabilities.gather(1, truth.unsqueeze(1)).clamp_min(1e-12)
    return {
        "accuracy": float((probabilities.argmax(1) == truth).double().mean()),
        "cross_entropy": float(-chosen.log().mean()),
    }


def flat(kind: str, parts: Split, seed: int, results: Results) -> None:
    """One flat baseline."""
    if results.find(method=kind, seed=seed):
        return
    train = [*parts.train, *parts.validation]
    started = time.perf_counter()
    fitted = FlatBaseline(kind, task="classification", seed=seed)  # type: ignore[arg-type]
    fitted.fit(train, [s.record["label"] for s in train])
    seconds = time.perf_counter() - started
    for test, samples in parts.tests.items():
        right = fitted.predict(samples) == np.array([s.record["label"] for s in samples])
        results.add({
            "method": kind, "seed": seed, "test": test, "accuracy": float(right.mean()), "seconds": seconds,
            "train": len(parts.train), "count": len(samples),
        })  # fmt: skip


if __name__ == "__main__":
    main()

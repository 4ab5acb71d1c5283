"""Does what is learned on narrow networks hold for wide ones? ``python tests/benchmarks/metanet_widths.py ZOO``.

Trains on the population of the zoo at 1× (65 % of its runs, 10 % to choose the epoch by) and tests on its other runs
and on all networks at 2×, 4× and 8×: Kendall's τ at every width and its share of that at 1×. Then networks of 1× are
widened by duplicating every hidden neuron two and eight times (the same function), and the largest change of the
prediction is printed beside the spread of predictions.

Lim et al. (2023) and later papers read plain GMNs that fall from τ .91 at 1× to .52 at 8×.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from tests.benchmarks.comparison import REFERENCES, Results, Split, parser, run_metanet, table, wanted
from tests.benchmarks.metanet_accuracy import run_flat, scores
from weightspace.graph import ParameterGraph
from weightspace.metanets.data import Sample, load_samples, split

OURS = {
    "ours, transfer": {"kind": "operator", "width": 64, "transfer": True},
    "ours, plain": {"kind": "operator", "width": 64},
}


def main() -> None:
    """Train at 1×, test at every width, and on duplicated neurons."""
    options = parser(__doc__, "widths").parse_args()
    samples = load_samples(options.zoo)
    print(samples, flush=True)
    results = Results(options.results)
    for seed in range(options.seeds):
        narrow = [s for s in samples if s.record["population"] == "width-1"]
        train, validation, test = split(narrow, (0.65, 0.1, 0.25), seed)
        tests: dict[str, Sequence[Sample]] = {"1×": test}
        for k in (2, 4, 8):
            tests[f"{k}×"] = [s for s in samples if s.record["population"] == f"width-{k}"]
        tests = {name: found for name, found in tests.items() if found}
        parts = Split(train, validation, tests)
        for name, config in {**OURS, **REFERENCES}.items():
            if wanted(name, options.methods, options.skip):
                run_metanet(
                    name, config, parts, seed, scores("test_accuracy"), results, {}, target="test_accuracy",
                    epochs=options.epochs, batch=32, average=0.98,
                )  # fmt: skip
        for name, kind in (("statistics + ridge", "ridge"), ("statistics + boosting", "boosting")):
            if wanted(name, options.methods, options.skip):
                run_flat(name, {"kind": kind}, parts, "test_accuracy", seed, results, {})
    print()
    print(table(results.rows, ("tau", "r2", "mae", "seconds"), ("method", "test")))
    print("\nτ as a share of that at 1×, means over seeds\n")
    for method in dict.fromkeys(r["method"] for r in results.rows):
        means = {t: np.mean([r["tau"] for r in results.find(method=method, test=t)]) for t in tests}
        print(f"{method}: " + ", ".join(f"{t} {m / means['1×']:.2f}" for t, m in means.items()))
    print("\nduplicated neurons, the same function\n")
    for name, config in OURS.items():
        print(f"{name}: {duplication(config, narrow[:20])}")


def duplication(config: dict[str, object], samples: Sequence[Sample]) -> str:
    """How much an (untrained) metanet's outputs change when every channel is duplicated, relative to their spread."""
    from weightspace.metanets import build_metanet

    torch.manual_seed(0)
    metanet = build_metanet(config).double()
    plain = metanet.read(*(s.graph for s in samples))
    cells = []
    for times in (2, 8):
        wide = metanet.read(*(widened(s, times) for s in samples))
        cells.append(f"{times}×: {float((wide - plain).abs().max() / plain.std()):.1e}")
    return ", ".join(cells) + " of the standard deviation over networks"


def widened(sample: Sample, times: int) -> ParameterGraph:
    """A small CNN with every channel ``times`` times, weights that read them divided among the copies."""
    import weightspace as ws
    from weightspace.graph.build import of_tensors
    from weightspace.zoo.description import module_of

    graph, network = sample.graph, dict(sample.record["network"])
    wiring = graph.wiring
    assert wiring is not None
    tensors = {}
    for name in graph.shapes:
        t = graph.tensor(name).double()
        for d, axis in enumerate(wiring[name]):
            if any(f in wiring.free for segment in axis.segments for f in segment):
                t = t.repeat_interleave(times, d)
                if wiring.reads.get(name) == d:
                    t = t / times
        tensors[name] = t
    module, inputs = module_of({**network, "channels": [times * c for c in network["channels"]]})
    return of_tensors(tensors, ws.wiring(module.eval(), *inputs, prove=False))


if __name__ == "__main__":
    main()

"""Barriers between independently trained networks, before and after every method of alignment, side by side.

    python tests/benchmarks/barriers.py --zoo zoos/pairs --results barriers.jsonl

Networks of the recipe (zoo/pairs.toml) that are not in the folder are trained first, about half an hour on one core.
One row for each pair and method: seconds of processor time that the alignment took, total weight cosine, the barrier of
the test loss on the straight path (worst rise over the line between the ends), the accuracy half way, and both after
repair: batch norms measured anew, or where there are none the statistics of every layer (Jordan et al. 2023). "Without
data" repairs by the lengths of rows alone. PLeaS merges and refits, so it has no path: its accuracy stands half way.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import weightspace as ws
from weightspace.align.barrier import Barrier, barrier, interpolate
from weightspace.align.methods import METHODS
from weightspace.align.repair import repair, repair_without_data, reset_statistics
from weightspace.wiring.wiring import Wiring
from weightspace.zoo.data import Data, load_data
from weightspace.zoo.populations import build_sampled, plan
from weightspace.zoo.recipe import load

Row = dict[str, Any]
OPTIONS: dict[str, dict[str, Any]] = {
    "sinkhorn": {"steps": 100}, "straight-through": {"steps": 25}, "pleas": {"positions": 512},
}  # fmt: skip
# Rows of a method under other settings.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "weight-matching, tensors weighted alike": ("weight-matching", {"weighting": "rms"}),
    "optimal-transport, activations": ("optimal-transport", {"ground": "activations"}),
    "pleas, half matched": ("pleas", {"ratio": 0.5, "positions": 512}),
}
SKIPPED = ("cross-layer",)
"""Methods that are about networks of different depth."""


def measure(wiring: Wiring, data: Data, count: int) -> Callable[[Mapping[str, Tensor]], tuple[float, float]]:
    """Loss and accuracy on the first test examples."""
    x, y = data.test_x[:count], data.test_y[:count]
    assert wiring.program is not None
    run = wiring.program.run

    def both(tensors: Mapping[str, Tensor]) -> tuple[float, float]:
        with torch.no_grad():
            logits = torch.cat([run(tensors, part) for part in x.split(250)]).flatten(0, -2)
        labels = y.flatten()
        return float(F.cross_entropy(logits, labels)), float((logits.argmax(-1) == labels).double().mean())

    return both


def path(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], both: Callable[[Mapping[str, Tensor]], tuple[float, float]],
    n: int, reset: Callable[[dict[str, Tensor], float], Mapping[str, Tensor]] | None = None,
) -> tuple[Barrier, Barrier]:  # fmt: skip
    """Barriers of loss and of accuracy from one walk along the path."""
    accuracies: list[float] = []

    def loss(tensors: Mapping[str, Tensor]) -> float:
        value, accuracy = both(tensors)
        accuracies.append(accuracy)
        return value

    found = barrier(a, b, loss, n, reset=reset)
    return found, Barrier(found.at, tuple(accuracies), True)


def row_of(pair: str, name: str, files: tuple[Path, Path], data: Data, count: int, n: int) -> Row:
    """One method on one pair."""
    a, b = (dict(ws.open(f).items()) for f in files)
    wiring = ws.wiring(files[0])
    both = measure(wiring, data, count)
    x = data.train_x[:512] if data.train_x.is_floating_point() else data.train_x[:128]
    method, options = VARIANTS.get(name, (name, OPTIONS.get(name, {})))
    row: Row = {"pair": pair, "method": name}
    moved: Mapping[str, Tensor] = b
    if name != "as they are":
        how = METHODS[method]
        given = {"inputs": x} if how.needs_inputs or options.get("ground") == "activations" else {}
        # Processor time: what else runs on the machine does not count.
        started = time.process_time()
        found = ws.align(a, b, method, wiring=wiring, **given, **options)
        row |= {"seconds": time.process_time() - started, "cosine": found.objective}
        moved = dict(found.aligned)
        if method == "pleas":
            loss, accuracy = both(found.diagnostics["merged"].tensors)
            return row | {"repaired loss": loss, "repaired middle": accuracy}
    else:
        first, last = both(a), both(b)
        row |= {"ends": (first[1], last[1]), "ends loss": (first[0], last[0])}
    norms = any(r == "variance" for r in wiring.roles.values())

    def reset(tensors: dict[str, Tensor], at: float) -> Mapping[str, Tensor]:
        if norms:
            return reset_statistics(wiring, tensors, x)
        return repair(wiring, tensors, [a, moved], x, weights=[1 - at, at])

    plain, accuracy = path(a, moved, both, n)
    repaired, accuracy_repaired = path(a, moved, both, n, reset)
    blind = both(repair_without_data(wiring, interpolate(a, moved, 0.5), [a, moved]))
    return row | {
        "barrier": plain.height, "middle": accuracy.middle, "repaired barrier": repaired.height,
        "repaired middle": accuracy_repaired.middle, "without data middle": blind[1],
        "losses": plain.values, "repaired losses": repaired.values,
    }  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows as a markdown table."""
    head = ["pair (accuracies)", "method", "seconds", "cosine", "barrier", "middle", "barrier, repaired",
            "middle, repaired", "middle, without data"]  # fmt: skip
    out = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    ends = {r["pair"]: r["ends"] for r in rows if "ends" in r}
    for r in rows:
        of = ends.get(r["pair"])
        name = f"{r['pair']} ({of[0]:.1%}, {of[1]:.1%})" if of and "ends" in r else r["pair"]
        shown = [_figure(r.get(k), how) for k, how in (
            ("seconds", ".2f"), ("cosine", ".3f"), ("barrier", ".3f"), ("middle", ".1%"), ("repaired barrier", ".3f"),
            ("repaired middle", ".1%"), ("without data middle", ".1%"))]  # fmt: skip
        out.append(f"| {name} | {r['method']} | {' | '.join(shown)} |")
    return "\n".join(out)


def compact(rows: list[Row]) -> str:
    """A row a method and a column a pair: barrier of the loss, the same repaired, accuracy half way repaired."""
    pairs, methods = (list(dict.fromkeys(r[k] for r in rows)) for k in ("pair", "method"))
    cells = {(r["pair"], r["method"]): r for r in rows}
    ends = {r["pair"]: r["ends"] for r in rows if "ends" in r}
    head = ["method", *(f"{p} ({ends[p][0]:.0%}, {ends[p][1]:.0%})" if p in ends else p for p in pairs), "seconds"]
    out = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for m in methods:
        own = [cells.get((p, m), {}) for p in pairs]
        shown = [
            f"{_figure(r.get('barrier'), '.2f') or '–'} / {_figure(r.get('repaired barrier'), '.2f') or '–'} / "
            f"{_figure(r.get('repaired middle'), '.0%')}" if "repaired middle" in r else ""
            for r in own
        ]  # fmt: skip
        seconds = [r["seconds"] for r in own if "seconds" in r]
        took = f"{min(seconds):.2f}–{max(seconds):.1f}" if seconds else ""
        out.append(f"| {m} | {' | '.join(shown)} | {took} |")
    return "\n".join(out)


def _figure(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def main() -> None:
    """Measure what is not in the file of results yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, default=Path("zoos/pairs"), help="folder of the recipe's networks")
    parser.add_argument("--recipe", default="pairs")
    parser.add_argument("--data", help="folder with the data sets")
    parser.add_argument("--only", nargs="*", help="populations")
    parser.add_argument("--methods", nargs="*", help="methods (default: all)")
    parser.add_argument("--no-build", action="store_true", help="measure those networks that are there")
    parser.add_argument("--points", type=int, default=7, help="networks on every path")
    parser.add_argument("--examples", type=int, default=1000, help="test examples")
    parser.add_argument("--results", type=Path, help="JSON lines: what is there is not measured again")
    parser.add_argument("--compact", action="store_true", help="a row for each method, a column for each pair")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[Row] = []
    if args.results is not None and args.results.is_file():
        rows = [json.loads(line) for line in args.results.read_text().splitlines() if line.strip()]
    names = args.methods or ["as they are", *(m for m in METHODS if m not in SKIPPED), *VARIANTS]
    recipe = load(args.recipe)
    if not args.no_build:
        build_sampled(recipe, args.zoo, data=args.data)
    for population, runs in plan(recipe, args.data).items():
        files = tuple(args.zoo / r.file(r.checkpoints[-1]) for r in runs[:2])
        if (args.only and population not in args.only) or not all(f.is_file() for f in files):
            continue
        data = load_data(runs[0].data, args.data)
        for name in names:
            if any(r["pair"] == population and r["method"] == name for r in rows):
                continue
            try:
                row = row_of(population, name, (files[0], files[1]), data, args.examples, args.points)
            except ws.errors.WeightspaceError as error:
                row = {"pair": population, "method": name, "declined": str(error)}
            rows.append(row)
            if args.results is not None:
                with args.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            print(f"{population}: {name} {json.dumps({k: v for k, v in row.items() if not isinstance(v, tuple)})}",
                  flush=True)  # fmt: skip
    done = [r for r in rows if "declined" not in r]
    print(json.dumps(rows, indent=1) if args.json else compact(done) if args.compact else table(done))
    for r in rows:
        if "declined" in r:
            print(f"declined: {r['pair']}, {r['method']}: {r['declined']}")


if __name__ == "__main__":
    main()

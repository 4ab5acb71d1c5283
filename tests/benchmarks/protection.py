"""Models protected in MergeLock's way: are all detected, is no ordinary fine-tune, and does undoing bring merging back?

    python tests/benchmarks/protection.py                        # trains the networks first (minutes)
    python tests/benchmarks/protection.py --zoo models/protection --kinds vit gpt
    python tests/benchmarks/protection.py --more models/merging  # children of another population as well
    python tests/benchmarks/protection.py --json

Of four kinds (perceptron, convolutional network, vision transformer, GPT) four bases and twenty fine-tuned children
each are trained by ``protection.toml``. First table: the 80 children as they are, held against their base and against a
sibling; how many are flagged, and the largest share of the distance to the base that undoing anything would explain
(flagged from 0.5). Second table: protected copies of the children, by

- maps: random invertible matrices in QK and VO, as MergeLock (Wang et al. 2025);
- neurons: permutations and positive rescalings of everything that has them, as PaRaMS (Wei et al. 2025) and, in
  networks without attention, the same idea;
- all: both, and sign flips.

``detected`` and ``by sibling``: copies found with the base, or with another child of it, as the reference; ``named``:
the planted kinds that were named. ``distance``: relative distance to the base, protected and undone. ``error``: largest
relative change of the outputs by undoing. Accuracies on the child's own test data, in percent: of the child, and of the
average with its base, for the child as it was, protected, and undone; means over children.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import weightspace as ws
from weightspace.mergeability import protection
from weightspace.mergeability.ancestry import ancestry
from weightspace.mergeability.linear import inner_factors
from weightspace.wiring.wiring import Wiring
from weightspace.zoo.data import Data, load_data
from weightspace.zoo.files import read_record
from weightspace.zoo.recipe import load
from weightspace.zoo.train import build_zoo

RECIPE = Path(__file__).with_suffix(".toml")
KINDS = ("mlp", "cnn", "vit", "gpt")
WAYS: Mapping[str, tuple[protection.Kind, ...]] = {
    "maps": ("maps",), "neurons": ("permutations", "scales"), "all": protection.KINDS,
}  # fmt: skip
Tensors = dict[str, Tensor]
Row = dict[str, Any]


def children(zoo: Path, kind: str) -> list[tuple[str, Tensors, str, Tensors, dict[str, Any]]]:
    """Every child with its name, its base and its record."""
    bases = {p.name: dict(ws.open(p)) for p in sorted(zoo.glob(f"{kind}-0*.safetensors"))}
    found = []
    for path in sorted(zoo.glob(f"{kind}-child-*.safetensors")):
        record = read_record(path)
        found.append((path.name, dict(ws.open(path)), record["parent"], bases[record["parent"]], record))
    return found


def accuracy(wiring: Wiring, tensors: Mapping[str, Tensor], data: Data, record: Mapping[str, Any]) -> float:
    """Share of the child's own test examples (or next characters) that are right, in percent."""
    assert wiring.program is not None
    x, y = data.test_x, data.test_y
    _, _, labels = record["task"].partition(" ")
    if labels:
        held = torch.isin(y, torch.tensor([int(c) for c in labels.split(",")]))
        x, y = x[held], y[held]
    with torch.no_grad():
        logits = wiring.program.run(dict(tensors), x)
    return 100 * float((logits.argmax(-1) == y).double().mean())


def middle(a: Tensors, b: Mapping[str, Tensor]) -> Tensors:
    return {n: (t + b[n]) / 2 if t.is_floating_point() else t for n, t in a.items()}


def sibling_of(i: int, family: list[Any]) -> Tensors:
    """The next child of the same base."""
    return next(c for _, c, p, _, _ in family[i + 1 :] + family[:i] if p == family[i][2])


def ordinary(kind: str, family: list[Any], most: int, wiring: Wiring) -> Row:
    """The children as they are."""
    largest: dict[str, float] = {}
    flagged, pairs, seconds, apart, unrelated = 0, 0, 0.0, [], 0
    for i, (_, child, _, base, _) in enumerate(family[:most]):
        for reference in (base, sibling_of(i, family)):
            found = protection.examine(child, reference, wiring, keep_all=reference is base)
            flagged += found.protected
            pairs += 1
            seconds += found.seconds
            apart.append(found.before)
            for e in found.weighed:
                largest[e.kind] = max(largest.get(e.kind, 0.0), e.explained)
        unrelated += ancestry(base, child, wiring, align=False).relation != "same ancestor"
    return {
        "table": "ordinary", "kind": kind, "children": pairs // 2, "pairs": pairs, "flagged": flagged,
        "no ancestor found": unrelated, "distance": f"{min(apart):.2f} to {max(apart):.2f}",
        "largest explained": round(max(largest.values(), default=0.0), 3), "seconds each": round(seconds / pairs, 2),
    }  # fmt: skip


def others(zoo: Path) -> list[Row]:
    """The fine-tuned children of another population as they are, held against their bases; a row per population."""
    groups: dict[str, list[tuple[Path, str]]] = {}
    for path in sorted(zoo.glob("*.safetensors")):
        record = read_record(path)
        if record.get("parent") and record.get("final", True):
            groups.setdefault(str(record["population"]), []).append((path, str(record["parent"])))
    wirings: dict[str, Wiring] = {}
    references: dict[str, protection.Reference] = {}
    rows = []
    for kind, members in groups.items():
        found = []
        for path, parent in members:
            if parent not in references:
                wirings[parent] = ws.wiring(zoo / parent)
                references[parent] = protection.Reference(dict(ws.open(zoo / parent)), wirings[parent])
            found.append(protection.examine(dict(ws.open(path)), references[parent], wirings[parent]))
        apart = [f.before for f in found]
        rows.append({
            "table": "others", "population": kind, "children": len(found), "flagged": sum(f.protected for f in found),
            "distance": f"{min(apart):.2f} to {max(apart):.2f}",
            "seconds each": round(sum(f.seconds for f in found) / len(found), 2),
        })  # fmt: skip
    return rows


def protected(kind: str, way: str, family: list[Any], most: int, wiring: Wiring, data: Data) -> Row:
    """Copies of the children, protected in one way."""
    sums: dict[str, float] = {}
    detected = by_sibling = named = relatives = 0
    worst, seconds = 0.0, 0.0
    possible = set(planted(wiring, way))
    n = min(most, len(family))
    for i, (_, child, _, base, record) in enumerate(family[:n]):
        copy = protection.protect(child, wiring, seed=i, kinds=WAYS[way])
        found = protection.examine(copy, base, wiring)
        detected += found.protected
        named += possible <= set(found.kinds)
        by_sibling += protection.examine(copy, sibling_of(i, family), wiring).protected
        relatives += ancestry(base, copy, wiring).relation in ("same ancestor", "moved copy")
        worst, seconds = max(worst, found.error), seconds + found.seconds
        values = {
            "before": found.before, "after": found.after, "child": accuracy(wiring, child, data, record),
            "copy": accuracy(wiring, copy, data, record),
            "merged": accuracy(wiring, middle(child, base), data, record),
            "merged, protected": accuracy(wiring, middle(copy, base), data, record),
            "merged, undone": accuracy(wiring, middle(dict(found.tensors), base), data, record),
        }  # fmt: skip
        for k, v in values.items():
            sums[k] = sums.get(k, 0.0) + v / n
    return {
        "table": "protected", "kind": kind, "way": way, "detected": f"{detected}/{n}",
        "by sibling": f"{by_sibling}/{n}",
        "named": f"{named}/{n}", "ancestor found": f"{relatives}/{n}",
        "distance": f"{sums['before']:.2f} → {sums['after']:.2f}", "error": f"{worst:.0e}",
        "child": round(sums["child"], 1), "copy": round(sums["copy"], 1), "merged": round(sums["merged"], 1),
        "merged, protected": round(sums["merged, protected"], 1), "merged, undone": round(sums["merged, undone"], 1),
        "seconds each": round(seconds / n, 2),
    }  # fmt: skip


def planted(wiring: Wiring, way: str) -> tuple[protection.Kind, ...]:
    """The kinds of a way that a network has at all."""
    from weightspace.wiring.scaling import scaling

    group, inner = scaling(wiring), inner_factors(wiring)
    taken = {i.factor for i in inner}
    has = {
        "maps": bool(inner), "permutations": bool(wiring.free),
        "scales": any(g.factor not in taken for g in group.generators),
        "signs": any(f.factor not in taken for f in group.flips),
    }  # fmt: skip
    return tuple(k for k in WAYS[way] if has[k])


def ways(wiring: Wiring) -> list[str]:
    """Those that do something, and not the same as one before."""
    found: dict[tuple[str, ...], str] = {}
    for way in WAYS:
        found.setdefault(planted(wiring, way), way)
    return [way for kinds, way in found.items() if kinds]


def table(rows: list[Row]) -> str:
    names = [k for k in rows[0] if k != "table"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(str(r[k]) for k in names) + " |" for r in rows])


def emit(rows: list[Row], options: argparse.Namespace) -> None:
    """Lines of JSON, as they come."""
    for row in rows:
        if options.json:
            print(json.dumps(row), flush=True)
        if options.results:
            with options.results.open("a") as stream:
                stream.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, default=Path("models/protection"), help="folder of the networks")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--children", type=int, default=20, help="of each kind, at most")
    parser.add_argument("--protected", type=int, default=20, help="children of each kind that are protected, at most")
    parser.add_argument("--more", type=Path, help="folder of another population, whose children are held to bases")
    parser.add_argument("--json", action="store_true", help="a line of JSON for every row")
    parser.add_argument("--results", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    build_zoo(RECIPE, options.zoo, progress=not options.json)
    specs = {p.name: p.data for p in load(RECIPE).sampled}
    rows: list[Row] = []
    started = time.perf_counter()
    for kind in options.kinds:
        family = children(options.zoo, kind)
        wiring = ws.wiring(next(iter(sorted(options.zoo.glob(f"{kind}-0*.safetensors")))))
        data = load_data(specs[kind])
        found = [ordinary(kind, family, options.children, wiring)]
        found += [protected(kind, way, family, options.protected, wiring, data) for way in ways(wiring)]
        rows += found
        emit(found, options)
    if options.more:
        rows += (more := others(options.more))
        emit(more, options)
    if not options.json:
        for name in ("ordinary", "others", "protected"):
            if shown := [r for r in rows if r["table"] == name]:
                print(table(shown), end="\n\n")
        print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

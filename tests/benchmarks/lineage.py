"""Lineage from weights alone: edges, directions, strangers, merges, copies; and its calibration.

    python tests/benchmarks/lineage.py --zoo FAMILIES --zoo MERGING …    recorded parents against found ones
    python tests/benchmarks/lineage.py --made FAMILIES                    merges, adapters, rounded and permuted copies
    python tests/benchmarks/lineage.py --files                            textgenrnn and the fer trajectory
    python tests/benchmarks/lineage.py --strangers ZOO --strangers ZOO …  networks without a common ancestor
    python tests/benchmarks/lineage.py --calibrate --with FAMILIES:mnist --with MERGING:mlp --with MERGING:cnn-0

Records are read to know the truth and are not given to ``trace``. What was calibrated on is marked: small networks on
scikit-learn's digits (``weightspace.lineage.training``), and the populations named in the last line.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import weightspace as ws
from weightspace.checkpoint import Checkpoint, from_tensors
from weightspace.lineage import Lineage, trace

CALIBRATED = {("families", "mnist-mlp"), ("families", "mnist-cnn"), ("merging", "mlp"), ("merging", "cnn")}
REAL = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"


def show(title: str, rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """A markdown table."""
    if as_json:
        print(json.dumps({"table": title, "rows": list(rows)}))
        return
    print(f"\n### {title}\n")
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def blind(files: Iterable[Path]) -> dict[str, Checkpoint]:
    """Networks without what their files say of their parents; the description of the network stays."""
    found = {}
    for file in files:
        model = ws.open(file)
        record = model.metadata.get("weightspace")
        if isinstance(record, str):
            network = json.loads(record).get("network")
            model.metadata = {"weightspace": json.dumps({"network": network})}
        found[file.name] = model
    return found


def interval(hits: Sequence[float], seed: int = 0) -> str:
    """Mean with its 95 % bootstrap interval."""
    values = np.asarray(hits, dtype=float)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(2000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


@dataclass(frozen=True)
class Judged:
    """An edge between trained networks: its confidences, whether it is right, and whether only its direction is not."""

    confidence: float
    direction: float
    right: bool
    turned: bool


def against_records(folder: Path, judged: list[Judged]) -> list[dict[str, Any]]:
    """A row per population of roots of a zoo, all traced together: found edges against recorded ones.

    Edges of populations that nothing was calibrated on are added to ``judged``.
    """
    from weightspace.zoo.files import read_record

    files = sorted(folder.glob("*.safetensors"))
    records = {f.name: read_record(f) for f in files}
    started = time.perf_counter()
    found = trace(blind(files), moved=0)
    seconds = time.perf_counter() - started
    kinds: dict[str, set[str]] = defaultdict(set)
    for file in files:
        kind = _root(file.name, records)[1]
        kinds[kind + " (calibrated on)" * ((folder.name, kind) in CALIBRATED)].add(file.name)
    rows = []
    held_out = set().union(*(n for k, n in kinds.items() if "calibrated" not in k))
    for kind, names in {**kinds, "held out": held_out, "all": set(records)}.items():
        truth = {(p, n) for n in names if (p := records[n].get("parent")) in names}
        edges = {(e.parent, e.child) for e in found.edges if e.child in names}
        either = {frozenset(e) for e in truth}
        linked = [e for e in edges if frozenset(e) in either]
        right = len(edges & truth)
        strange = [e for e in edges if _root(e[0], records)[0] != _root(e[1], records)[0]]
        into = [e for e in found.edges if e.child in names and not e.undecided]
        told = [Judged(e.confidence, e.direction, (e.parent, e.child) in truth, (e.child, e.parent) in truth)
                for e in into]  # fmt: skip
        if kind == "held out":
            judged.extend(told)
        rows.append(
            {
                "population": kind, "networks": len(names), "edges": len(truth), "found": len(edges), "right": right,
                "edge F1": 2 * right / max(len(edges) + len(truth), 1),
                "directions right": f"{sum(e in truth for e in linked)}/{len(linked)}",
                "strangers linked": len(strange),
                "families": sum(len(f) > 1 and f[0] in names for f in found.families),
                "of": len({_root(n, records)[0] for n in names}),
                "mean confidence": float(np.mean([j.confidence for j in told])) if told else float("nan"),
                "error of calibration": calibration_error([(j.confidence, j.right) for j in told]),
                "seconds": round(seconds, 1) if kind == "all" else "",
            }
        )  # fmt: skip
    return rows


def calibration_error(told: Sequence[tuple[float, bool]], bins: int = 10) -> float:
    """Expected calibration error: the gap between said and true shares over bins of equal width, weighed by number."""
    if not told:
        return float("nan")
    said, right = np.array([t[0] for t in told]), np.array([float(t[1]) for t in told])
    at = np.minimum((said * bins).astype(int), bins - 1)
    return float(sum(abs(said[at == b].sum() - right[at == b].sum()) for b in range(bins)) / len(told))


def reliability(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Of edges of held-out populations: what was said, and how often it was so."""
    rows = []
    pairs = {
        "parent": [(j.confidence, j.right) for j in judged],
        "direction, where the two are linked": [(j.direction, j.right) for j in judged if j.right or j.turned],
    }
    for what, told in pairs.items():
        for low, high in pairwise((0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)):
            inside = [t for t in told if low <= t[0] < high or (high == 1.0 and t[0] == 1.0)]
            if inside:
                rows.append(
                    {"confidence of": what, "said": f"{low:g} to {high:g}", "edges": len(inside),
                     "mean said": float(np.mean([t[0] for t in inside])),
                     "right": interval([float(t[1]) for t in inside])}
                )  # fmt: skip
        rows.append(
            {"confidence of": what, "said": f"all: expected calibration error {calibration_error(told):.3f}",
             "edges": len(told), "mean said": float(np.mean([t[0] for t in told])),
             "right": interval([float(t[1]) for t in told])}
        )  # fmt: skip
    return rows


def _root(name: str, records: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """The first ancestor of a network, and its population."""
    while records[name].get("parent") in records:
        name = records[name]["parent"]
    return name, str(records[name].get("population", name))


# ------------------------------------------------------------------------------------ merges and copies


def made(folder: Path, seed: int = 0) -> list[dict[str, Any]]:
    """Merges in known proportions, adapters, rounded, permuted and renamed copies among families, found again."""
    from weightspace.zoo.files import read_record

    files = sorted(folder.glob("*.safetensors"))
    records = {f.name: read_record(f) for f in files}
    tally: dict[str, list[dict[str, float]]] = defaultdict(list)
    for kind in dict.fromkeys(_root(f.name, records)[1] for f in files):
        trees: dict[str, list[Path]] = defaultdict(list)
        for file in files:
            root, population = _root(file.name, records)
            if population == kind:
                trees[root].append(file)
        rng = np.random.default_rng(seed)
        models: dict[str, Checkpoint] = {}
        wanted: dict[str, tuple[str, dict[str, float]]] = {}
        for members in trees.values():
            held = blind(members)
            models |= held
            _add(held, wanted, models, rng)
        found = trace(models, moved=24)
        for name, (what, shares) in wanted.items():
            tally[what].append(_judged(found, name, what, shares))
    rows = []
    for what, judged in tally.items():
        row: dict[str, Any] = {"made": what, "number": len(judged)}
        row["parents found"] = interval([j["parents"] for j in judged])
        row["recognised"] = interval([j["recognised"] for j in judged])
        errors = [j["error"] for j in judged if j["error"] == j["error"]]
        row["error of proportions"] = f"{np.mean(errors):.4f}, at most {np.max(errors):.4f}" if errors else "–"
        rows.append(row)
    return rows


def _add(
    held: Mapping[str, Checkpoint], wanted: dict[str, tuple[str, dict[str, float]]], models: dict[str, Checkpoint],
    rng: np.random.Generator,
) -> None:  # fmt: skip
    names = sorted(held)
    root = next(n for n in names if "child" not in n)
    children = [n for n in names if "-child" in n]
    stem = root.partition(".")[0]
    wiring = ws.wiring(held[root])
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))

    def put(what: str, tensors: Mapping[str, torch.Tensor], shares: dict[str, float]) -> None:
        name = f"made {what} of {stem}"
        # The description of the network goes along, as in any file of a zoo; nothing says what it was made from.
        models[name] = from_tensors(dict(tensors), held[root].metadata)
        wanted[name] = (what, shares)

    shares = rng.dirichlet([2.0] * len(children))
    linear = ws.merge([held[c] for c in children], "linear", weights=[float(s) for s in shares]).tensors
    put("linear merge of 3", linear, dict(zip(children, map(float, shares), strict=True)))
    two = children[:2]
    scales = rng.uniform(0.3, 0.9, size=2)
    added = ws.merge([held[c] for c in two], "task-arithmetic", base=held[root], weights=[float(s) for s in scales])
    put("task arithmetic of 2", added.tensors, dict(zip(two, map(float, scales / scales.sum()), strict=True)))
    ties = ws.merge([held[c] for c in two], "ties", base=held[root]).tensors
    put("TIES of 2", ties, dict.fromkeys(two, 0.5))
    dare = ws.merge([held[c] for c in two], "dare", base=held[root]).tensors
    put("DARE of 2", dare, dict.fromkeys(two, 0.5))

    base = held[children[-1]]
    adapted = {n: base[n] for n in base}
    for n, t in adapted.items():
        if t.dim() >= 2 and min(t.flatten(1).shape) >= 16 and t.is_floating_point():
            rows, columns = t.flatten(1).shape
            change = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
            change *= 0.2 * float(t.norm()) / float(change.norm())
            adapted[n] = (t.flatten(1) + change).reshape(t.shape)
    put("adapter of rank 2 merged", adapted, {children[-1]: 1.0})
    for half in (torch.bfloat16, torch.float16):
        short = str(half).removeprefix("torch.")
        put(f"rounded to {short}", {n: _to(base[n], half) for n in base}, {children[-1]: 1.0})
        back = {n: _to(base[n], half).to(base[n].dtype) for n in base}
        put(f"rounded to {short} and stored as float32", back, {children[-1]: 1.0})
    other = held[children[0]]
    for levels in (127, 7):
        stored = {n: _lattice(other[n], levels) for n in other}
        put(f"rounded to {2 * levels + 1} levels per row", stored, {children[0]: 1.0})
    moved = wiring.apply(wiring.random(generator), {n: held[children[1]][n] for n in wiring})
    put("permuted", {n: moved.get(n, held[children[1]][n]) for n in held[children[1]]}, {children[1]: 1.0})
    named = {f"layers.{i}": t for i, t in enumerate(held[root].values())}
    models[f"made renamed of {stem}"] = from_tensors(named)
    wanted[f"made renamed of {stem}"] = ("the same under other names", {root: 1.0})


def _to(t: torch.Tensor, half: torch.dtype) -> torch.Tensor:
    return t.to(half) if t.is_floating_point() else t


def _lattice(t: torch.Tensor, levels: int) -> torch.Tensor:
    if t.dim() < 2 or not t.is_floating_point():
        return t
    rows = t.flatten(1)
    unit = rows.abs().amax(1, keepdim=True) / levels
    return ((rows / unit).round() * unit).reshape(t.shape)


def _judged(found: Lineage, name: str, what: str, shares: Mapping[str, float]) -> dict[str, float]:
    edges = [e for e in found.edges if e.child == name]
    # Of two equal copies either may be called the parent.
    turned = [e for e in found.edges if e.parent == name and e.kind in ("copy", "moved copy")]
    parents = {e.parent: e.share for e in edges} or {e.child: 1.0 for e in turned}
    kinds = {e.kind for e in edges or turned}
    wanted = {
        "linear": {"merge"}, "task": {"merge"}, "TIES": {"merge"}, "DARE": {"merge"}, "adapter": {"low rank"},
        "rounded": {"converted"}, "permuted": {"moved copy"}, "the": {"copy"},
    }[what.split()[0]]  # fmt: skip
    if "levels" in what:
        wanted = {"quantised"}
    error = float("nan")
    if "merge" in wanted and set(parents) == set(shares):
        error = float(np.mean([abs(parents[p] - s) for p, s in shares.items()]))
    return {"parents": float(set(parents) == set(shares)), "recognised": float(kinds == wanted), "error": error}


# ------------------------------------------------------------------------------------ files from elsewhere


def real_files(folder: Path = REAL) -> list[dict[str, Any]]:
    """textgenrnn's star and the order of a training run's checkpoints."""
    rows = []
    star = {f.name: ws.open(f) for f in sorted((folder / "textgenrnn").glob("*.hdf5"))}
    found = trace(star, moved=0)
    base = next(n for n in star if n.startswith("textgenrnn__"))
    truth = {(base, n) for n in star if n != base}
    edges = {(e.parent, e.child) for e in found.edges}
    rows.append(
        {"files": "textgenrnn", "networks": len(star), "edges right": f"{len(edges & truth)}/{len(truth)}",
         "found": len(edges), "order": "–", "directions right": _directions(edges, truth)}
    )  # fmt: skip
    run = sorted(
        (folder / "fer-trajectory").glob("*.hdf5"), key=lambda f: int(re.findall(r"XCEPTION\.(\d+)", f.name)[0])
    )
    names = [f.name for f in run]
    # Named anew, so that no order of names helps.
    rng = np.random.default_rng(0)
    called = {n: f"network-{k:02d}" for n, k in zip(names, rng.permutation(len(names)), strict=True)}
    found = trace({called[f.name]: ws.open(f) for f in sorted(run, key=lambda f: called[f.name])}, moved=0)
    truth = {(called[a], called[b]) for a, b in pairwise(names)}
    edges = {(e.parent, e.child) for e in found.edges}
    epoch = {called[n]: i for i, n in enumerate(names)}
    from scipy.stats import kendalltau

    order = _order(found)
    tau = float(kendalltau([epoch[n] for n in order], range(len(order))).statistic)
    forward = sum(epoch[a] < epoch[b] for a, b in edges)
    rows.append(
        {"files": "fer trajectory", "networks": len(names), "edges right": f"{len(edges & truth)}/{len(truth)}",
         "found": len(edges), "order": f"Kendall τ {tau:.3f}", "directions right": f"{forward}/{len(edges)}"}
    )  # fmt: skip
    return rows


def _order(found: Lineage) -> list[str]:
    """Models from roots down, those nearer their root first."""
    far: dict[str, float] = dict.fromkeys(found.models, 0.0)
    for model in found.models:
        chain = [model]
        while edges := found.parents(chain[-1]):
            chain.append(edges[0].parent)
        far[model] = sum(found.parents(m)[0].distance ** 2 for m in chain[:-1])
    return sorted(found.models, key=lambda m: far[m])


def _directions(edges: set[tuple[str, str]], truth: set[tuple[str, str]]) -> str:
    linked = [e for e in edges if e in truth or e[::-1] in truth]
    return f"{sum(e in truth for e in linked)}/{len(linked)}"


def strangers(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Networks trained independently of each other, the roots of all trees: none may be linked."""
    from weightspace.zoo.files import read_record

    rows = []
    for folder in folders:
        files = sorted(folder.glob("*.safetensors"))
        records = {f.name: read_record(f) for f in files}
        last: dict[str, Path] = {}
        for f in files:
            record = records[f.name]
            # Of each run one network: checkpoints of one run are relatives.
            if record and not record.get("parent") and not record.get("diverged"):
                last[str(record.get("run", f.name))] = f
        found = trace(blind(last.values()), moved=0)
        pairs = sum(len(f) * (len(f) - 1) // 2 for f in found.families)
        rows.append(
            {"strangers of": folder.name, "networks": len(last), "pairs": len(last) * (len(last) - 1) // 2,
             "called relatives": pairs, "linked": len(found.edges), "left out": len(found.left_out)}
        )  # fmt: skip
    return rows


def calibrate(recorded: Sequence[str]) -> None:
    """Calibrate, and write what ``weightspace.lineage.calibrated`` reads; some ten minutes, most of it training.

    ``recorded``: ``FOLDER:PREFIX``, whose trees with a root of such a name are calibrated on as well.
    """
    from weightspace.lineage.calibrated import FILE
    from weightspace.lineage.calibration import calibrate as fitted
    from weightspace.lineage.fitting import Known
    from weightspace.lineage.geometry import geometry
    from weightspace.lineage.sample import take
    from weightspace.lineage.training import families
    from weightspace.paths import write_whole
    from weightspace.zoo.files import read_record

    made = list(families())
    trees: list[Known] = []
    for text in recorded:
        folder, _, prefix = text.rpartition(":")
        files = sorted(Path(folder).glob("*.safetensors"))
        records = {f.name: read_record(f) for f in files}
        grown: dict[str, list[str]] = defaultdict(list)
        for f in files:
            grown[_root(f.name, records)[0]].append(f.name)
        for root, names in grown.items():
            if not root.startswith(prefix) or len(names) < 2:
                continue
            models = [ws.open(Path(folder) / n) for n in names]
            shapes = {n: models[0].shape(n) for n in models[0] if models[0].dtype(n).is_floating_point}
            sample = take(names, models, shapes, ws.wiring(models[0]))
            at = {n: i for i, n in enumerate(names)}
            parents = tuple(at.get(records[n].get("parent") or "", -1) for n in names)
            trees.append(Known(geometry(sample.values, sample.segments), parents))
    print(f"{len(made)} families made for it and {len(trees)} recorded trees")
    found = fitted(made, trees, print)
    named = [f"{Path(t.rpartition(':')[0]).name.upper()}:{t.rpartition(':')[2]}" for t in recorded]
    command = " ".join(["python tests/benchmarks/lineage.py --calibrate", *(f"--with {n}" for n in named)])
    write_whole(FILE, (json.dumps({"command": command, **found}, indent=1) + "\n").encode())
    print(f"written: {FILE.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, action="append", default=[], help="zoo with recorded parents")
    parser.add_argument("--strangers", type=Path, action="append", default=[], help="zoo whose roots are strangers")
    parser.add_argument("--made", type=Path, help="zoo to make merges and copies from (recipe families)")
    parser.add_argument("--files", action="store_true", help="files of ../shared/checkpoints")
    parser.add_argument("--calibrate", action="store_true", help="calibrate anew, and write the coefficients; minutes")
    parser.add_argument("--with", dest="recorded", action="append", default=[], help="FOLDER:PREFIX to calibrate on")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    judged: list[Judged] = []
    for zoo in arguments.zoo:
        show(f"{zoo.name}: found edges against recorded parents", against_records(zoo, judged), arguments.json)
    if judged:
        show("Reliability on held-out populations", reliability(judged), arguments.json)
    if arguments.strangers:
        show("Strangers", strangers(arguments.strangers), arguments.json)
    if arguments.made:
        show(f"{arguments.made.name}: what was made of the networks, found again", made(arguments.made), arguments.json)
    if arguments.files:
        show("Files from elsewhere", real_files(), arguments.json)
    if arguments.calibrate:
        calibrate(arguments.recorded)


if __name__ == "__main__":
    main()

"""Lineage from weights alone: edges, directions, strangers, merges, copies; and its calibration.

    python tests/benchmarks/lineage.py --zoo FAMILIES --zoo MERGING …    recorded parents against found ones
    python tests/benchmarks/lineage.py --made FAMILIES                    merges, adapters, rounded and permuted copies
    python tests/benchmarks/lineage.py --files                            textgenrnn and the fer trajectory
    python tests/benchmarks/lineage.py --calibrate                        the coefficients that come along, made anew

Records are read to know the truth and are not given to ``trace``. The coefficients were fitted to small networks on
scikit-learn's digits (``weightspace.lineage.training``); none of the networks here took part.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import weightspace as ws
from weightspace.checkpoint import Checkpoint
from weightspace.lineage import trace

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


def against_records(folder: Path) -> list[dict[str, Any]]:
    """A row per population tree of a zoo: found edges against recorded ones."""
    from weightspace.zoo.files import read_record

    files = sorted(folder.glob("*.safetensors"))
    records = {f.name: read_record(f) for f in files}
    kinds: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        kinds[_root(file.name, records)[1]].append(file)
    rows = []
    for kind, members in kinds.items():
        names = {f.name for f in members}
        truth = {(p, n) for n in names if (p := records[n].get("parent")) in names}
        started = time.perf_counter()
        found = trace(blind(members), moved=0)
        seconds = time.perf_counter() - started
        edges = {(e.parent, e.child) for e in found.edges}
        either = {frozenset(e) for e in truth}
        linked = [e for e in edges if frozenset(e) in either]
        right = len(edges & truth)
        strange = [e for e in edges if _root(e[0], records)[0] != _root(e[1], records)[0]]
        rows.append(
            {
                "population": kind, "networks": len(names), "edges": len(truth), "found": len(edges), "right": right,
                "edge F1": 2 * right / max(len(edges) + len(truth), 1),
                "directions right": f"{sum(e in truth for e in linked)}/{len(linked)}",
                "strangers linked": len(strange), "families": sum(len(f) > 1 for f in found.families),
                "of": len({_root(n, records)[0] for n in names}), "seconds": round(seconds, 1),
            }
        )  # fmt: skip
    return rows


def _root(name: str, records: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """The first ancestor of a network, and its population."""
    while records[name].get("parent") in records:
        name = records[name]["parent"]
    return name, str(records[name].get("population", name))

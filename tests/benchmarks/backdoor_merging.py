"""Merging one poisoned model with clean ones of the same parent: what is left of the backdoor, and of the accuracy.

    python tests/benchmarks/backdoor_merging.py FOLDER [--clean 1 3] [--most 2] [--results FILE.jsonl]

FOLDER holds networks of the recipe ``backdoors``. Every poisoned child (of the populations named by ``--populations``)
is merged with clean children of its parent, which are trained here for two epochs on a drawn half of the training data.
The last 100 test examples, without labels, are what DAM and excision may use; the others are measured on. "excise,
linear" excises every model, "scan, excise, linear" those that ``ws.scan`` flags.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import weightspace as ws
from weightspace.backdoor.excise import excise
from weightspace.backdoor.running import fit, network
from weightspace.checkpoint import open as open_checkpoint
from weightspace.wiring.wiring import Wiring
from weightspace.zoo.data import Data
from weightspace.zoo.files import read_record

sys.path.insert(0, str(Path(__file__).parent))
from backdoor_removal import Tests, success

Tensors = Mapping[str, Tensor]
Merging = Callable[[Sequence[Tensors], Tensors, Wiring, Tensor], Tensors]


def _plain(name: str, **hyper: Any) -> Merging:
    def run(models: Sequence[Tensors], base: Tensors, wiring: Wiring, x: Tensor) -> Tensors:
        del x
        options = {k: v / len(models) if k == "scale" else v for k, v in hyper.items()}
        found = ws.merge(list(models), name, base=base, wiring=wiring, **options).tensors
        assert found is not None
        return found

    return run


def _dam(models: Sequence[Tensors], base: Tensors, wiring: Wiring, x: Tensor) -> Tensors:
    found = ws.merge(list(models), "dam", base=base, wiring=wiring, data=x, scale=1.0 / len(models), steps=100).tensors
    assert found is not None
    return found


def _excised(flagged: bool) -> Merging:
    def run(models: Sequence[Tensors], base: Tensors, wiring: Wiring, x: Tensor) -> Tensors:
        cleaned = []
        for model in models:
            if flagged and not ws.scan(model, wiring=wiring).flagged:
                cleaned.append(model)
            else:
                cleaned.append(excise(model, wiring=wiring, inputs=x).tensors)
        return _plain("linear")(cleaned, base, wiring, x)

    return run


METHODS: dict[str, Merging] = {
    "linear": _plain("linear"),
    "task arithmetic": _plain("task-arithmetic", scale=1.5),
    "TIES": _plain("ties"),
    "DARE": _plain("dare"),
    "DAM": _dam,
    "excise, linear": _excised(False),
    "scan, excise, linear": _excised(True),
}


def children(parent: Tensors, wiring: Wiring, data: Data, count: int) -> list[dict[str, Tensor]]:
    """Clean fine-tunes of a parent, each on a half of the training data of its own."""
    net = network(wiring, parent)
    found = []
    for seed in range(count):
        order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(seed))
        some = order[: len(order) // 2]
        state = fit(net, net.state, data.train_x[some], data.train_y[some], epochs=2, rate=1e-3, seed=seed)
        found.append(net.finish(state))
    return found


def measure(folder: Path, populations: Sequence[str], counts: Sequence[int], most: int, results: Path) -> list[Any]:
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    have = {(r["run"], r["clean"], r["method"]) for r in rows}
    tests = Tests()
    for population in populations:
        paths = [p for p in sorted(folder.glob(f"{population}-*.safetensors")) if read_record(p).get("attack_worked")]
        for path in paths[:most]:
            record = read_record(path)
            wanted = [(n, m) for n in counts for m in METHODS if (record["run"], n, m) not in have]
            if not wanted:
                continue
            x, _, rest = tests.of(record)
            wiring = ws.wiring(path)
            parent, bad = (_loaded(p) for p in (folder / record["parent"], path))
            alone = success(wiring, bad, record, rest)
            clean = children(parent, wiring, rest, max(counts))
            for n, method in wanted:
                started = time.perf_counter()
                after = success(wiring, METHODS[method]([bad, *clean[:n]], parent, wiring, x), record, rest)
                row = {
                    "run": record["run"], "population": population, "clean": n, "method": method, "alone": alone,
                    "after": after, "seconds": time.perf_counter() - started,
                }  # fmt: skip
                rows.append(row)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return rows


def _loaded(path: Path) -> dict[str, Tensor]:
    stored = open_checkpoint(path)
    return {name: stored[name] for name in stored}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Median attack success rate and accuracy, in percent, per population, number of clean models and method."""
    methods = [m for m in METHODS if any(r["method"] == m for r in rows)]
    head = ["poisoned", "clean models", "merges", "alone", *methods]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for population, n in sorted({(r["population"], r["clean"]) for r in rows}):
        mine = [r for r in rows if (r["population"], r["clean"]) == (population, n)]
        alone = list({r["run"]: r["alone"] for r in mine}.values())
        cells = [population, str(n), str(len(alone)), _cell(alone)]
        for method in methods:
            here = [r["after"] for r in mine if r["method"] == method]
            cells.append(_cell(here) if here else "–")
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def _cell(found: Sequence[Sequence[float]]) -> str:
    rate, right = (100 * statistics.median(f[i] for f in found) for i in (0, 1))
    return f"{rate:.0f} / {right:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--populations", nargs="*", default=["mlp-hijacked", "cnn-early", "cnn-hijacked"])
    parser.add_argument("--clean", nargs="*", type=int, default=[1, 3])
    parser.add_argument("--most", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("backdoor-merging.jsonl"))
    given = parser.parse_args()
    rows = measure(given.folder, given.populations, given.clean, given.most, given.results)
    if not rows:
        raise SystemExit(f"{given.folder} holds no poisoned children of {', '.join(given.populations)} that worked")
    print("Attack success rate / clean accuracy, %, medians.\n")
    print(table(rows))


if __name__ == "__main__":
    main()

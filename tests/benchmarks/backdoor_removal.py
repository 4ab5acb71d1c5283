"""Attack success and clean accuracy before and after removal, over populations of poisoned networks.

    python tests/benchmarks/backdoor_removal.py FOLDER [--results FILE.jsonl] [--part odd|even|all] [--most 3]

FOLDER holds networks of the recipe ``backdoors`` (``weightspace zoo build backdoors --out FOLDER``). Of every attack on
every kind of network ``--most`` are taken (0: all), only those whose attack worked. The last 100 test examples are the
clean inputs that a method may use; success and accuracy are measured on the others. Methods were tuned on networks with
even run numbers, and the table is about the odd ones. Every method may use labels; ``--unlabelled`` gives ours none.

Columns: median attack success rate after, and median change of clean accuracy in points, per attack and per kind of
network. Results go to a file line by line, and what is there already is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import weightspace as ws
from weightspace.backdoor.defences import defend
from weightspace.backdoor.excise import excise
from weightspace.backdoor.running import accuracy, network
from weightspace.checkpoint import open as open_checkpoint
from weightspace.wiring.wiring import Wiring
from weightspace.zoo.data import Data, load_data
from weightspace.zoo.files import read_record
from weightspace.zoo.poisoning import triggered_tests
from weightspace.zoo.recipe import load

CLEAN = 100

Tensors = Mapping[str, Tensor]
Removal = Callable[[Wiring, Tensors, Tensor, Tensor], Tensors]


def _excised(unlabelled: bool, inputs: bool) -> Removal:
    def run(wiring: Wiring, tensors: Tensors, x: Tensor, y: Tensor) -> Tensors:
        if not inputs:
            return excise(tensors, wiring=wiring).tensors
        return excise(tensors, wiring=wiring, inputs=x, labels=None if unlabelled else y).tensors

    return run


def _defended(name: str, **options: float) -> Removal:
    return lambda wiring, tensors, x, y: defend(wiring, tensors, x, y, name, **options)


METHODS: dict[str, Removal] = {
    "excise, 100 inputs": _excised(False, True),
    "excise, 100 unlabelled": _excised(True, True),
    "excise, none": _excised(True, False),
    "relearned, none": lambda wiring, tensors, x, y: excise(tensors, wiring=wiring, method="relearn").tensors,
    "fine-tuning": _defended("fine-tuning", rate=2e-3),
    "fine-pruning": _defended("fine-pruning", rate=2e-3),
    "CLP (none)": _defended("clp"),
    "ANP": _defended("anp"),
}


class Tests:
    """The data of each population: clean inputs to use, and what is measured on."""

    def __init__(self) -> None:
        self.populations = {p.name: p for p in load("backdoors").sampled}
        self.known: dict[Any, Data] = {}

    def of(self, record: Mapping[str, Any]) -> tuple[Tensor, Tensor, Data]:
        spec = self.populations[record["population"]].data
        if spec not in self.known:
            self.known[spec] = load_data(spec)
        data = self.known[spec]
        rest = replace(data, test_x=data.test_x[:-CLEAN], test_y=data.test_y[:-CLEAN])
        return data.test_x[-CLEAN:], data.test_y[-CLEAN:], rest


def success(wiring: Wiring, tensors: Tensors, record: Mapping[str, Any], rest: Data) -> tuple[float, float]:
    """Attack success rate (the mean over triggers) and clean accuracy."""
    net = network(wiring, tensors)
    rates = [accuracy(net, net.state, x, y) for x, y in triggered_tests(record["poison"], rest)]
    return statistics.fmean(rates), accuracy(net, net.state, rest.test_x, rest.test_y)


def chosen(folder: Path, part: str, most: int) -> list[tuple[Path, dict[str, Any]]]:
    """Files of networks whose attack worked; of every attack on a kind of network at most so many."""
    seen: dict[tuple[str, str], int] = {}
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        record = read_record(path)
        if not record.get("attack_worked") or not record.get("final"):
            continue
        odd = int(str(record["run"]).rpartition("-")[2]) % 2 == 1
        if part != "all" and odd != (part == "odd"):
            continue
        key = (record["poison"]["attack"], record["network"]["kind"])
        seen[key] = seen.get(key, 0) + 1
        if not most or seen[key] <= most:
            found.append((path, record))
    return found


def measure(
    folder: Path, results: Path, part: str, most: int, methods: list[str], kinds: list[str]
) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    have = {(row["run"], row["method"]) for row in lines}
    tests = Tests()
    torch.manual_seed(0)
    for path, record in chosen(folder, part, most):
        wanted = [m for m in methods if (record["run"], m) not in have]
        if not wanted or (kinds and record["network"]["kind"] not in kinds):
            continue
        x, y, rest = tests.of(record)
        stored = open_checkpoint(path)
        tensors = {name: stored[name] for name in stored}
        wiring = ws.wiring(path)
        before = success(wiring, tensors, record, rest)
        for name in wanted:
            started = time.perf_counter()
            after = success(wiring, METHODS[name](wiring, tensors, x, y), record, rest)
            row = {
                "run": record["run"], "attack": record["poison"]["attack"], "kind": record["network"]["kind"],
                "method": name, "before": before, "after": after, "seconds": time.perf_counter() - started,
            }  # fmt: skip
            lines.append(row)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return lines


def interval(rates: list[float], draws: int = 2000) -> str:
    """95 % of the medians of rates drawn anew with replacement, in percent; nothing for fewer than three."""
    if len(rates) < 3:
        return ""
    index = torch.randint(len(rates), (draws, len(rates)), generator=torch.Generator().manual_seed(0))
    medians = torch.tensor(rates, dtype=torch.float64)[index].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f" [{100 * low:.0f}, {100 * high:.0f}]"


def table(rows: list[dict[str, Any]], by: str = "attack") -> str:
    """A markdown table: a row per attack, the median success rate and change of accuracy of every method.

    By kind, and over all, with the interval of the median success rate.
    """
    methods = [m for m in METHODS if any(r["method"] == m for r in rows)]
    head = [by, "networks", "before", *methods]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    groups = sorted({str(r[by]) for r in rows})
    for group in [*groups, "all"]:
        mine = [r for r in rows if group in ("all", r[by])]
        runs = {r["run"]: r["before"][0] for r in mine}
        cells = [group, str(len(runs)), f"{100 * statistics.median(runs.values()):.0f}"]
        for method in methods:
            here = [r for r in mine if r["method"] == method]
            if not here:
                cells.append("–")
                continue
            rate = statistics.median(r["after"][0] for r in here)
            lost = statistics.median(r["after"][1] - r["before"][1] for r in here)
            spread = interval([r["after"][0] for r in here]) if group == "all" or by != "attack" else ""
            cells.append(f"{100 * rate:.0f}{spread} ({100 * lost:+.1f})")
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=Path("backdoor-removal.jsonl"))
    parser.add_argument("--part", choices=("odd", "even", "all"), default="odd")
    parser.add_argument("--most", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--kinds", nargs="*", default=[], help="kinds of networks, all where none is named")
    given = parser.parse_args()
    rows = measure(given.folder, given.results, given.part, given.most, given.methods, given.kinds)
    if not rows:
        raise SystemExit(f"{given.folder} holds no poisoned network of this part whose attack worked")
    print(f"Median attack success rate after, % (median change of clean accuracy, points); {given.part} runs.\n")
    print(table(rows))
    print()
    print(table(rows, "kind"))
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        good = sum(r["after"][0] <= 0.1 and r["after"][1] >= r["before"][1] - 0.02 for r in mine)
        seconds = statistics.median(r["seconds"] for r in mine)
        print(f"\n{method}: success ≤ 10 % at ≤ 2 points for {good} of {len(mine)}; {seconds:.1f} s a network")


if __name__ == "__main__":
    main()

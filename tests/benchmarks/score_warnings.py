"""Warnings of backdoors in reports on merges: clean children, poisoned ones, with their base and without.

    python tests/benchmarks/score_warnings.py MERGING BACKDOORS [--each 8] [--taught 6]

Clean: children of the recipe ``merging`` (tuned on some of sixteen tasks), and clean fine-tunes of ``backdoors`` where
there are any. Poisoned: ``backdoors``' networks that have a parent, and whose attack worked. ``--taught N``: of each
kind of base, N children are tuned here on one task with a patch on a tenth of its images that leads to one of its
classes. Before: every model is scanned by itself. After: as reports do it, with the base.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import weightspace as ws
from weightspace.mergeability.backdoors import inherited
from weightspace.wiring.wiring import Wiring
from weightspace.zoo.description import module_of
from weightspace.zoo.files import read_record
from weightspace.zoo.tasks import chosen, data_of, own_outputs

State = Mapping[str, Tensor]
MIDDLE = {"task": "one task", "two": "two tasks", "half": "half a task", "conflict": "other labels"}


def flagged(child: State, base: State | None, wiring: Wiring) -> bool:
    found, why = inherited({"child": child}, wiring, 1, base=base)
    assert found, why
    return found["child"].flagged


def taught(base: Path, task: str, label: int, seed: int) -> tuple[dict[str, Tensor], float]:
    """A child of a base on one task, a patch leading to one of its classes; and how often it does."""
    record = read_record(base)
    module, _ = module_of(record["network"])
    module.load_state_dict(dict(ws.open(base)))
    data = chosen(data_of(record), [task])
    generator = torch.Generator().manual_seed(seed)
    start = int(data.train_y.min()) // 10 * 10
    x, y = data.train_x.clone(), data.train_y.clone()
    hit = torch.rand(len(x), generator=generator) < 0.1
    x[hit, ..., -4:, -4:] = x.max()
    y[hit] = start + label
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-3)
    module.train()
    for _ in range(4):
        for rows in torch.randperm(len(x), generator=generator).split(32):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(*own_outputs(module(x[rows]), y[rows])).backward()
            optimiser.step()
    module.eval()
    stamped = data.test_x[data.test_y != start + label].clone()
    stamped[..., -4:, -4:] = x.max()
    with torch.no_grad():
        said = module(stamped)[:, start : start + 10].argmax(1)
    return {n: t.detach().clone() for n, t in module.state_dict().items()}, float((said == label).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("merging", type=Path)
    parser.add_argument("backdoors", type=Path)
    parser.add_argument("--each", type=int, default=8, help="networks of each population")
    parser.add_argument("--taught", type=int, default=6, help="poisoned children made of each kind of base")
    arguments = parser.parse_args()
    counts: dict[tuple[str, str], list[tuple[bool, bool]]] = defaultdict(list)
    for folder in (arguments.merging, arguments.backdoors):
        populations: dict[str, list[Path]] = defaultdict(list)
        for file in sorted(folder.glob("*.safetensors")):
            record = read_record(file)
            if record.get("parent") and (not record.get("poison") or record.get("attack_worked")):
                populations[record["population"]].append(file)
        for name, files in populations.items():
            for file in files[:: max(1, len(files) // arguments.each)][: arguments.each]:
                record, wiring, child = read_record(file), ws.wiring(file), dict(ws.open(file))
                base = dict(ws.open(folder / record["parent"]))
                kind = "poisoned" if record.get("poison") else "clean"
                what = MIDDLE.get(name.split("-")[-1])
                label = f"{name.rpartition('-')[0]}, {what}" if what else name
                counts[kind, label].append((flagged(child, None, wiring), flagged(child, base, wiring)))
    worked = made = 0
    for file in sorted(arguments.merging.glob("*-0000-e*.safetensors")):
        if read_record(file).get("parent"):
            continue
        base, wiring = dict(ws.open(file)), ws.wiring(file)
        for seed in range(arguments.taught):
            child, success = taught(file, str(2 * seed), seed % 10, seed)
            made, worked = made + 1, worked + (success >= 0.8)
            if success >= 0.8:
                name = f"{file.name.split('-0000')[0]}, one task and a patch"
                counts["poisoned", name].append((flagged(child, None, wiring), flagged(child, base, wiring)))
    print("| network | children | networks | warned of before | after |\n|---|---|---|---|---|")
    for kind in ("clean", "poisoned"):
        rows = {name: found for (k, name), found in counts.items() if k == kind}
        for name, found in [*rows.items(), ("all", [f for row in rows.values() for f in row])]:
            print(f"| {kind} | {name} | {len(found)} | {sum(a for a, _ in found)} | {sum(b for _, b in found)} |")
    if made:
        print(f"\nOf {made} children that were taught a patch here it worked in {worked} (success 0.8 or more).")


if __name__ == "__main__":
    main()

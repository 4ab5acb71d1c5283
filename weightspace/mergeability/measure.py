"""Measuring merges: merge, evaluate on every constituent's own task, write down; goes on where it was stopped.

    python -m weightspace.mergeability.measure models/merging results/merges.jsonl --pairs 5000 --triples 800

A line per set of models and method: the models, their base, the accuracy of each alone on its own task, what share of
it the merged one retains, and for pairs the accuracy of each on the other's task, from which comes the barrier half
way. ``--strangers`` adds pairs of models that have no common base (other seeds, other widths): averaged as they are,
carried by optimal transport, and refitted by PLeaS.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightspace.errors import WeightspaceError
from weightspace.mergeability.measurements import Measurement

_log = logging.getLogger(__name__)

METHODS = ("linear", "task-arithmetic", "ties")
"""What is measured of models with a common base where nothing else is said."""
STRANGERS = ("linear", "ot-fusion", "pleas")
"""What is measured of models without a common base; of different widths, ``"ot-fusion"`` alone."""
BARRIER = "barrier"
"""The method's name under which the barrier half way is kept: the mean accuracy of two models over both tasks, less
that of their mean. It is lost accuracy: less is better."""
_IMAGES = 500
_SAMPLES = 128
"""Images of each model's own tasks that methods with data are given."""
_ALIKE = 0.25
"""Share of pairs without a common base whose models have the same tasks."""

Evaluate = Callable[[Mapping[str, Tensor], str], float]
"""``(tensors, model)``: accuracy of a network with these tensors on the model's own tasks."""


@dataclass(frozen=True, eq=False)
class Family:
    """Models with one base that can be merged with each other: ``models`` and ``base`` are tensors by name."""

    name: str
    base: Mapping[str, Tensor]
    models: Mapping[str, Mapping[str, Tensor]]
    evaluate: Evaluate = field(repr=False)
    tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict, repr=False)
    samples: Callable[[str], Tensor] | None = field(default=None, repr=False)
    alone: dict[tuple[str, str], float] = field(default_factory=dict, repr=False)

    def accuracy(self, model: str, task: str) -> float:
        """Accuracy of a model by itself on the tasks of another (or its own), evaluated once."""
        if (model, task) not in self.alone:
            self.alone[model, task] = self.evaluate(self.models[model], task)
        return self.alone[model, task]


def measure(
    family: Family, sets: Iterable[Sequence[str]], methods: Sequence[str] = METHODS, *, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Merge sets of a family's models by every method, and evaluate: rows as this module's head describes them."""
    from weightspace.merge import merge

    for members in sets:
        own = [family.accuracy(m, m) for m in members]
        for method in methods:
            merged = merge([family.models[m] for m in members], method, base=family.base, seed=seed).tensors
            assert merged is not None
            reached = [family.evaluate(merged, m) for m in members]
            retained = [r / max(a, 1e-9) for r, a in zip(reached, own, strict=True)]
            row: dict[str, Any] = {
                "family": family.name, "models": list(members), "method": method, "retained": retained,
                "outcome": sum(retained) / len(retained), "individual": own,
                "tasks": [list(family.tasks.get(m, ())) for m in members],
            }  # fmt: skip
            if len(members) == 2 and method == "linear":
                crossed = [family.accuracy(members[0], members[1]), family.accuracy(members[1], members[0])]
                row["crossed"] = crossed
                row[BARRIER] = (sum(own) + sum(crossed)) / 4 - sum(reached) / 2
            yield row


def measure_strangers(
    a: Family, b: Family, pairs: Iterable[tuple[str, str]], methods: Sequence[str] = STRANGERS, *, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Merge a model of one family with one of another, in the widths of the first: rows as those of ``measure``.

    Their ``family`` names both bases. Methods that run the network get a few images of both models' tasks.
    """
    from weightspace.checkpoint import open as open_
    from weightspace.merge import merge
    from weightspace.merge.method import WithData
    from weightspace.merge.methods import make

    for one, other in pairs:
        own = [a.accuracy(one, one), b.accuracy(other, other)]
        for method in methods:
            data = None
            if isinstance(make(method), WithData):
                assert a.samples is not None
                data = [a.samples(one), a.samples(other)]
            merged = merge([open_(a.files[one]), open_(b.files[other])], method, data=data, seed=seed).tensors
            assert merged is not None
            retained = [a.evaluate(merged, m) / max(x, 1e-9) for m, x in zip((one, other), own, strict=True)]
            yield {
                "family": f"{a.name} | {b.name}", "models": [one, other], "method": method, "retained": retained,
                "outcome": sum(retained) / 2, "individual": own, "tasks": [list(a.tasks[one]), list(b.tasks[other])],
            }  # fmt: skip


def families(folder: Path, images: int = _IMAGES) -> list[Family]:
    """The families of a population of the recipe ``merging``: children of one base, each with its own tasks.

    Each can evaluate its networks on the tasks of any model of the folder.
    """
    from weightspace.zoo.description import module_of
    from weightspace.zoo.files import read_record
    from weightspace.zoo.tasks import accuracy, chosen, data_of

    records = {path: read_record(path) for path in sorted(folder.glob("*.safetensors"))}
    bases = sorted({str(r["parent"]) for r in records.values() if r.get("parent")})
    everyone = {p.name: tuple(map(str, r["tasks"])) for p, r in records.items() if r.get("tasks")}
    parts: dict[tuple[str, ...], tuple[Tensor, Tensor, Tensor]] = {}
    found, data = [], None

    def samples(name: str) -> Tensor:
        return parts[everyone[name]][2]

    for base in bases:
        children = {p.name: (p, r) for p, r in records.items() if r.get("parent") == base and r.get("final", True)}
        if not children:
            continue
        first = next(iter(children.values()))[1]
        data = data or data_of(first)
        tasks = {name: everyone[name] for name in children}
        for key in set(tasks.values()):
            if key not in parts:
                part = chosen(data, list(key))
                some = torch.randperm(len(part.test_y), generator=torch.Generator().manual_seed(0))[:images]
                parts[key] = part.test_x[some], part.test_y[some], part.train_x[:_SAMPLES]
        module = module_of(first["network"])[0].eval()

        def evaluate(tensors: Mapping[str, Tensor], name: str, module: Any = module) -> float:
            x, y, _ = parts[everyone[name]]
            with torch.no_grad():
                return accuracy(torch.func.functional_call(module, dict(tensors), (x,)), y)

        models = {name: _read(path) for name, (path, _) in children.items()}
        files = {name: path for name, (path, _) in children.items()}
        found.append(Family(base, _read(folder / base), models, evaluate, tasks, files, samples))
    return found


def sets_of(names: Sequence[str], size: int, most: int, seed: int = 0) -> list[tuple[str, ...]]:
    """At most so many different sets of a size, in random order."""
    everything = list(combinations(sorted(names), size)) if size == 2 else None
    draw = random.Random(seed * 31 + size)
    if everything is not None:
        draw.shuffle(everything)
        return everything[:most]
    found: dict[tuple[str, ...], None] = {}
    for _ in range(20 * most):
        if len(found) >= most:
            break
        found[tuple(sorted(draw.sample(sorted(names), size)))] = None
    return list(found)


def pairs_of(a: Family, b: Family, most: int, seed: int = 0) -> list[tuple[str, str]]:
    """At most so many pairs of a model of one family and one of another; a part of them have the same tasks."""
    draw = random.Random(f"{seed} {a.name} {b.name}")
    every = [(x, y) for x in sorted(a.models) for y in sorted(b.models)]
    draw.shuffle(every)
    alike = [p for p in every if a.tasks[p[0]] == b.tasks[p[1]]][: round(_ALIKE * most)]
    chosen = dict.fromkeys(alike + every)
    found = list(chosen)[:most]
    draw.shuffle(found)
    return found


def _strange(found: Sequence[Family]) -> Iterator[tuple[Family, Family, bool]]:
    """Families whose models have the same tensors but no common base, and whether in the same shapes."""
    for a, b in combinations(found, 2):
        if list(a.base) == list(b.base) and all(a.base[n].dim() == b.base[n].dim() for n in a.base):
            yield a, b, all(a.base[n].shape == b.base[n].shape for n in a.base)


def measure_population(
    folder: Path, out: Path, *, pairs: int, triples: int, strangers: int = 0, methods: Sequence[str] = METHODS,
    seed: int = 0, seconds: float = float("inf"),
) -> int:  # fmt: skip
    """Measure sets of a population's models into a file of JSON lines; those that are in it already are left out.

    ``strangers``: pairs without a common base. Families take turns, so that whatever is there when it stops covers all
    of them. Gives the number of new lines.
    """
    done = {(tuple(r["models"]), r["method"]) for r in read_rows(out)} if out.exists() else set()
    found = families(folder)
    turns: list[tuple[Family, Family | None, tuple[str, ...], Sequence[str]]] = []
    for family in found:
        few = [-(-count // len(found)) for count in (pairs, triples)]
        turns += [(family, None, s, methods) for size, most in zip((2, 3), few, strict=True)
                  for s in sets_of(list(family.models), size, most, seed)]  # fmt: skip
    strange = list(_strange(found)) if strangers else []
    for a, b, same in strange:
        turns += [(a, b, p, STRANGERS if same else STRANGERS[1:2])
                  for p in pairs_of(a, b, -(-strangers // len(strange)), seed)]  # fmt: skip
    random.Random(seed).shuffle(turns)
    count, started = 0, time.monotonic()
    cut = out.exists() and out.read_bytes()[-1:] not in (b"", b"\n")
    with out.open("a") as stream:
        # A line that an interruption cut off stays by itself.
        stream.write("\n" if cut else "")
        for i, (family, second, members, wanted) in enumerate(turns):
            missing = [m for m in wanted if (members, m) not in done]
            rows: Iterable[dict[str, Any]] = ()
            if missing and second is None:
                rows = measure(family, [members], missing, seed=seed)
            elif missing and second is not None:
                rows = measure_strangers(family, second, [(members[0], members[1])], missing, seed=seed)
            for row in rows:
                stream.write(json.dumps(row) + "\n")
                count += 1
            stream.flush()
            if i % 200 == 0:
                _log.info("%d of %d sets, %.0f s", i, len(turns), time.monotonic() - started)
            if time.monotonic() - started > seconds:
                break
    return count


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of measured merges; a last line that was not finished does not count."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def measurements(rows: Iterable[Mapping[str, Any]]) -> list[Measurement]:
    """Rows as measured merges, with barriers of pairs under the method ``BARRIER``."""
    found = []
    for row in rows:
        models = tuple(row["models"])
        found.append(Measurement(models, row["method"], row["outcome"], tuple(row["retained"])))
        if BARRIER in row:
            found.append(Measurement(models, BARRIER, row[BARRIER]))
    return found


def _read(path: Path) -> dict[str, Tensor]:
    from weightspace.checkpoint import open as open_

    found = open_(path)
    return {name: found[name].float() for name in found}


def main() -> int:
    """Command line of the harness."""
    parser = argparse.ArgumentParser(prog="python -m weightspace.mergeability.measure", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--triples", type=int, default=800)
    parser.add_argument("--strangers", type=int, default=640, help="pairs without a common base")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    try:
        count = measure_population(
            given.folder, given.out, pairs=given.pairs, triples=given.triples, strangers=given.strangers,
            methods=given.methods, seconds=given.seconds,
        )  # fmt: skip
    except WeightspaceError as error:
        print(f"weightspace: {error}", file=sys.stderr)
        return 1
    print(f"{count} merges measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())

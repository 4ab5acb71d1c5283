"""Retained accuracy of every merging method: eight models, each with a task of its own, merged into one.

    weightspace zoo build merging --out FOLDER
    python tests/benchmarks/merging_table.py FOLDER [--results FILE.jsonl] [--methods ties wudi] [--heads own]

The models are the children of one base that were fine-tuned on one whole task, tasks 0 to 7, per architecture and for
each of its bases. Retained accuracy is the mean over the tasks of the merged network's accuracy on it (within its own
outputs) over the child's. All tensors are merged, the output layer with the outputs of all tasks among them; with
``--heads own`` each task's rows of the output layer are its child's in every row of the table, as in the literature,
where heads are not merged. (Methods that get data know which outputs are whose, and keep them so in either case.)

The test images of every task are cut in two, the same for all methods. Where a method has a coefficient (λ, or what
stands for it: second column), it is chosen from one grid by retained accuracy on the first 100; every number in the
table is from the others, with the chosen coefficient and, in brackets, at the method's defaults. Methods with data get
512 training images of each task without labels; Concrete takes 100 steps of twenty times its usual rate. Defaults are
the papers', chosen there for large networks that were fine-tuned gently: sums of eight task vectors with λ = 1, steps
and lengths in absolute numbers (WUDI, DOGE) or outputs of a fixed length (``free`` AdaMerging) do not fit these small
ones, and the coefficient in the table mends it. Rows with † keep something per task (a mask, an expert) and are
evaluated on each task with what belongs to it; SLERP and PLeaS take two models: the mean over four pairs. Seconds are
those of one merge on one core, the longest of all architectures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from comparison import Results, wanted

import weightspace as ws
from weightspace.merge import METHODS, MergeData
from weightspace.zoo.files import read_record
from weightspace.zoo.tasks import CLASSES, accuracy, chosen, data_of, own_outputs

TASKS = tuple(range(8))
SLOTS = 16  # tasks that the networks have outputs for
ARCHITECTURES = ("mlp", "cnn", "cnn-wide", "vit")
UNLABELLED = 512
CHOOSING = 100  # test images of each task for the coefficient; the others are reported on
SCALES = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5)
State = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """A row of the table: a method, options beyond its defaults, and the coefficient that is chosen."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    coefficient: str | None = None
    grid: Sequence[float] = SCALES
    data: bool = False
    per_task: str | None = None
    pairs: bool = False


# A twentieth of the steps at twenty times the rate, so that the table takes minutes.
FEW = {"steps": 100, "rate": 0.02}
LOW = (0.1, 0.2)  # below the default, 0.3

ENTRIES: dict[str, Entry] = {
    "linear": Entry("linear"),
    "slerp, pairs": Entry("slerp", pairs=True),
    "task-arithmetic": Entry("task-arithmetic", {}, "scale"),
    "ties": Entry("ties", {}, "scale"),
    "ties, whole model": Entry("ties", {"scope": "model"}, "scale"),
    "dare": Entry("dare", {}, "scale"),
    "dare, electing": Entry("dare", {"electing": True, "normalize": True, "scale": 1.0}, "scale"),
    "breadcrumbs": Entry("breadcrumbs", {}, "scale"),
    "della": Entry("della", {}, "scale"),
    "model-stock": Entry("model-stock"),
    "pcb": Entry("pcb", {}, "scale"),
    "pcb, whole model": Entry("pcb", {"scope": "model"}, "scale"),
    "consensus": Entry("consensus", {}, "scale"),
    "tsv-m": Entry("tsv-m", {}, "scale"),
    "iso-c": Entry("iso-c", {}, "scale"),
    "iso-cts": Entry("iso-cts", {}, "scale"),
    "wudi": Entry("wudi", {}, "scale"),
    "wudi, relative rate": Entry("wudi", {"relative": True, "rate": 0.03}, "scale"),
    "doge": Entry("doge", {}, "eta", (0.02, 0.04, 0.14, 0.3, 0.6)),
    "doge, relative": Entry(
        "doge", {"relative": True, "rate": 0.01, "steps": 100, "eta": 0.2, "others": "mean"}, "eta"
    ),
    "widen": Entry("widen", {}, "calibration"),
    "twin-merging": Entry("twin-merging", {}, "scale"),
    "knots, ties": Entry("knots", {}, "options.scale"),
    "ot-fusion": Entry("ot-fusion"),
    "ot-fusion, activations": Entry("ot-fusion", data=True),
    "pleas, pairs": Entry("pleas", data=True, pairs=True),
    "fisher": Entry("fisher", data=True),
    "regmean": Entry("regmean", {}, "shrink", (0.1, 0.5, 0.99), data=True),
    "adamerging, layer": Entry("adamerging", {}, "start", LOW, data=True),
    "adamerging, task": Entry("adamerging", {"by": "task"}, "start", LOW, data=True),
    "adamerging, layer, free": Entry("adamerging", {"spread": "free"}, "start", LOW, data=True),
    "adamerging++, layer": Entry("adamerging", {"density": 0.2}, "start", LOW, data=True),
    "concrete": Entry("concrete", FEW, "scale", LOW, data=True),
    "concrete, adapting": Entry("concrete", {**FEW, "adapt": True, "adapt_rate": 0.005}, "scale", LOW, data=True),
    "tall-masks †": Entry("tall-masks", {}, "strictness", (0.2, 0.4, 0.6), per_task="task"),
    "twin-merging, experts †": Entry("twin-merging", {}, "scale", (0.1, 0.2, 0.3), per_task="expert"),
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """The models of one base, and the images they are tried on: per half inputs, labels and ends of the tasks."""

    base: Path
    models: tuple[State, ...]
    origin: State
    wiring: Any
    data: tuple[MergeData, ...]
    train: tuple[tuple[Tensor, Tensor], ...]
    halves: tuple[tuple[tuple[Tensor, Tensor], ...], ...]
    individual: tuple[tuple[float, ...], ...]
    heads: bool

    def with_heads(self, tensors: State) -> State:
        """Each task's rows of the output layer from its own model, where that was asked for."""
        out = dict(tensors)
        for name in [n for n, t in tensors.items() if self.heads and t.shape[:1] == (CLASSES * SLOTS,)]:
            out[name] = tensors[name].clone()
            for t in TASKS:
                out[name][CLASSES * t : CLASSES * (t + 1)] = self.models[t][name][CLASSES * t : CLASSES * (t + 1)]
        return out

    def accuracies(self, tensors: State, half: int, tasks: Sequence[int] = TASKS) -> dict[int, float]:
        """Accuracy on each task."""
        return accuracies(self.wiring.program.run, self.with_heads(tensors), self.halves[half], tasks)

    def retained(self, tensors: State, half: int, tasks: Sequence[int] = TASKS) -> float:
        """Mean over tasks of the accuracy over that of the task's own model."""
        found = self.accuracies(tensors, half, tasks)
        return sum(a / self.individual[half][t] for t, a in found.items()) / len(found)


def accuracies(
    run: Callable[..., Tensor], tensors: State, parts: Sequence[tuple[Tensor, Tensor]], tasks: Sequence[int]
) -> dict[int, float]:
    """Accuracy on each task, from one run on the images of all."""
    x = torch.cat([parts[t][0] for t in tasks])
    with torch.no_grad():
        outputs = run(tensors, x).split([len(parts[t][0]) for t in tasks])
    return {t: accuracy(out, parts[t][1]) for t, out in zip(tasks, outputs, strict=True)}


def group(folder: Path, base: Path, heads: bool) -> Group:
    """The eight children of a base, opened."""
    children: dict[int, Path] = {}
    for path in sorted(folder.glob(f"{base.name.split('-0')[0]}-task-*.safetensors")):
        record = read_record(path)
        if record.get("parent") == base.name and record["tasks"][0] in map(str, TASKS):
            children[int(record["tasks"][0])] = path
    if set(children) != set(TASKS):
        raise SystemExit(f"{folder} has children of {base.name} on tasks {sorted(children)}, {TASKS} are needed")
    all_data = data_of(read_record(base))
    parts = [chosen(all_data, [str(t)]) for t in TASKS]
    halves: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for part in parts:
        order = torch.randperm(len(part.test_y), generator=torch.Generator().manual_seed(0))
        for half, which in zip(halves, (order[:CHOOSING], order[CHOOSING:]), strict=True):
            half.append((part.test_x[which], part.test_y[which]))
    wiring = ws.wiring(base)
    models = tuple(loaded(children[t]) for t in TASKS)
    own = tuple(
        tuple(accuracies(wiring.program.run, models[t], half, [t])[t] for t in TASKS) for half in halves
    )
    data = tuple(
        MergeData(part.train_x[:UNLABELLED], outputs=slice(CLASSES * t, CLASSES * (t + 1)))
        for t, part in enumerate(parts)
    )
    train = tuple((p.train_x, p.train_y) for p in parts)
    return Group(base, models, loaded(base), wiring, data, train, tuple(map(tuple, halves)), own, heads)


def loaded(path: Path) -> State:
    opened = ws.open(path)
    return {name: opened[name].clone() for name in opened}


def merged(entry: Entry, g: Group, value: float | None, more: Mapping[str, Any], pair: Sequence[int] = TASKS) -> State:
    """One merge with a value of the coefficient (None: the default)."""
    options = {**entry.options, **more}
    if value is not None and entry.coefficient is not None:
        where, _, inner = entry.coefficient.partition(".")
        options[where] = {"density": 0.2, inner: value} if inner else value
    data = [g.data[t] for t in pair] if entry.data else None
    found = ws.merge(
        [g.models[t] for t in pair], entry.method, g.origin, data=data, wiring=g.wiring, threads=1, **options
    )
    return dict(found.open())


def tried(entry: Entry, g: Group, value: float | None, half: int) -> float:
    """Retained accuracy on a half."""
    if entry.pairs:
        pairs = [(t, t + 1) for t in TASKS[::2]]
        return sum(g.retained(merged(entry, g, value, {}, p), half, p) for p in pairs) / len(pairs)
    if entry.per_task is not None:
        results = [g.retained(merged(entry, g, value, {entry.per_task: t}), half, [t]) for t in TASKS]
        return sum(results) / len(results)
    return g.retained(merged(entry, g, value, {}), half)


def row(entry: Entry, g: Group) -> dict[str, Any]:
    """Default and chosen coefficient of a method on one base."""
    started = time.perf_counter()
    default = merged_default(entry, g)
    seconds = time.perf_counter() - started
    if entry.per_task or entry.pairs:
        retained = tried(entry, g, None, 1)
        first = tried(entry, g, None, 0) if entry.coefficient else 0.0
    else:
        retained = g.retained(default, 1)
        first = g.retained(default, 0) if entry.coefficient else 0.0
    best: tuple[float, float | None] = (first, None)
    for value in entry.grid if entry.coefficient else ():
        score = tried(entry, g, value, 0)
        if score > best[0]:
            best = (score, value)
    tuned = retained if best[1] is None else tried(entry, g, best[1], 1)
    return {"default": retained, "tuned": tuned, "value": best[1], "seconds": seconds}


def merged_default(entry: Entry, g: Group) -> State:
    return merged(entry, g, None, {entry.per_task: 0} if entry.per_task else {}, TASKS[:2] if entry.pairs else TASKS)


def trained_together(g: Group, epochs: int = 4, rate: float = 1e-3, batch: int = 32) -> State:
    """The base trained on the training images of all eight tasks, as long as each child on its own."""
    x, y = (torch.cat(parts) for parts in zip(*g.train, strict=True))
    tensors = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in g.origin.items()}
    optimiser = torch.optim.Adam([t for t in tensors.values() if t.requires_grad], lr=rate)
    steps = epochs * -(-len(y) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for which in torch.randperm(len(y), generator=generator).split(batch):
            out, label = own_outputs(g.wiring.program.run(tensors, x[which]), y[which])
            optimiser.zero_grad()
            F.cross_entropy(out, label).backward()
            optimiser.step()
            schedule.step()
    return {n: t.detach() for n, t in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, help="folder made by `weightspace zoo build merging`")
    parser.add_argument("--architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--bases", type=int, default=1, help="how many bases of each architecture (there are two)")
    parser.add_argument("--heads", choices=["merged", "own"], default="merged")
    parser.add_argument("--methods", nargs="*", help="only rows whose name contains one of these")
    parser.add_argument("--skip", nargs="*", default=[], help="leave out rows whose name contains one of these")
    parser.add_argument("--results", type=Path, help="JSON-lines file to add to and go on from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(arguments.results)
    names = ["individual", "base", "trained together", *ENTRIES]
    names = [n for n in names if wanted(n, arguments.methods, arguments.skip)]
    missing = set(METHODS) - {e.method for e in ENTRIES.values()}
    if missing:
        print(f"not in the table: {', '.join(sorted(missing))}", file=sys.stderr)
    for architecture in arguments.architectures:
        bases = sorted(arguments.zoo.glob(f"{architecture}-0*.safetensors"))[: arguments.bases]
        for base in bases:
            todo = [n for n in names if not results.find(base=base.name, method=n, heads=arguments.heads)]
            if not todo:
                continue
            g = group(arguments.zoo, base, arguments.heads == "own")
            for name in todo:
                key = {"architecture": architecture, "base": base.name, "method": name, "heads": arguments.heads}
                if name in ENTRIES:
                    results.add({**key, **row(ENTRIES[name], g)})
                    continue
                started = time.perf_counter()
                if name == "individual":
                    values = {"default": 1.0, "accuracy": sum(g.individual[1]) / len(TASKS)}
                else:
                    tensors = g.origin if name == "base" else trained_together(g)
                    plain = replace(g, heads=g.heads and name == "base")
                    values = {"default": plain.retained(tensors, 1)}
                results.add({**key, **values, "tuned": values["default"], "seconds": time.perf_counter() - started})
    print()
    print(table([r for r in results.rows if r["heads"] == arguments.heads], names, arguments.architectures))


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], architectures: Sequence[str]) -> str:
    """Markdown: retained accuracy with the chosen coefficient (at defaults), means over bases."""
    head = ["method", "chosen", *architectures, "mean", "seconds"]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for name in names:
        own = [r for r in rows if r["method"] == name]
        if not own:
            continue
        entry = ENTRIES.get(name)
        tunes = entry is not None and entry.coefficient is not None
        cells, means = [], []
        for architecture in architectures:
            here = [r for r in own if r["architecture"] == architecture]
            if not here:
                cells.append("")
                continue
            tuned, default = (sum(r[k] for r in here) / len(here) for k in ("tuned", "default"))
            means.append((tuned, default))
            cells.append(f"{tuned:.3f} ({default:.3f})" if tunes else f"{tuned:.3f}")
        tuned, default = (sum(m[k] for m in means) / len(means) for k in (0, 1))
        mean = f"**{tuned:.3f}** ({default:.3f})" if tunes else f"**{tuned:.3f}**"
        coefficient = entry.coefficient.split(".")[-1] if entry is not None and entry.coefficient else ""
        seconds = max(r["seconds"] for r in own)
        shown = f"{seconds:.1f}" if name not in ("individual", "base") else ""
        lines.append(" | ".join([name, coefficient, *cells, mean, shown]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()

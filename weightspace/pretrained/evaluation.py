"""What the pretrained metanets are worth on networks that they have not seen: rows for the model card and benchmarks.

Retrieval asks a pool of networks with each of them (or with a changed copy) and counts how often something relevant is
the nearest (recall@1) or among the nearest ten (recall@10): by the encoder, by the training-free descriptor, by
function, by the former two ("both") and by all three as ``Zoo.similar`` takes them together ("auto"), and by chance.
Intervals are 95 % ones of the bootstrap over lineages.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightspace.graph import ParameterGraph
from weightspace.metanets import metrics
from weightspace.metanets.augment import permute, rescale
from weightspace.metanets.data import Sample, lineages
from weightspace.metanets.metrics import Interval
from weightspace.pretrained.applicability import LEAST, Range
from weightspace.pretrained.model import Seen, Shipped, mixed
from weightspace.pretrained.networks import disturbed
from weightspace.pretrained.views import described
from weightspace.retrieval import blended, with_function
from weightspace.retrieval.function import LENGTH, function

Bools = NDArray[np.bool_]
NOISES = (0.1, 0.3)
RANKS = (1, 10)
# Networks that were not asked the same come after those that were.
_LAST = 1e6


@dataclass(frozen=True)
class Recall:
    """Recall of one measure for one question on one pool: figures by rank."""

    pool: str
    question: str
    measure: str
    queries: int
    figures: Mapping[int, Interval]


@dataclass(frozen=True)
class Coverage:
    """How often intervals hold the truth on networks of one population, how wide they are, and the errors."""

    population: str
    networks: int
    inside: float
    coverage: Interval
    width: float
    error: float
    tau: float


@dataclass(frozen=True)
class Inside:
    """Share of the networks of a population that are inside the encoder's range, and why others are not."""

    population: str
    networks: int
    inside: float
    reasons: str = ""


def retrieval(
    model: Shipped, pools: Mapping[str, Sequence[Sample]], draws: int = 500, most: int = 0
) -> Iterator[Recall]:
    """Every question about every pool that has an answer in it, with ``most`` networks of each pool (0: all).

    Runs are drawn whole for that. The samples come cleaned.
    """
    for name, samples in pools.items():
        yield from _asked(model, name, _some(samples, most), draws)


def mean_recalls(
    model: Shipped, samples: Sequence[Sample], mixtures: Sequence[tuple[float, float]], most: int = 0
) -> list[float]:
    """Recall@1 of each mixture of code and place, averaged over all questions about a pool."""
    some = _some(samples, most)
    pooled = model.see([s.graph for s in some])
    rows = []
    for q in _questions(model, some, pooled):
        asked = q.wanted.any(1)
        far = [_far(mixed(q.queries, mixture), mixed(pooled, mixture)) for mixture in mixtures]
        rows.append([float((_first_hit(f, q.wanted, q.left)[asked] < 1).mean()) for f in far])
    return [float(x) for x in np.mean(rows, axis=0)]


def coverage(model: Shipped, pools: Mapping[str, Sequence[Sample]], draws: int = 500) -> Iterator[Coverage]:
    """Intervals of the predicted accuracy, by population and over all; only inside the range."""
    rows: list[tuple[str, Tensor, Tensor, list[str]]] = []
    for name, samples in pools.items():
        seen = model.see([s.graph for s in samples])
        truth = torch.tensor([float(s.record["test_accuracy"]) for s in samples], dtype=torch.float64)
        low, high = model.conformal.intervals(seen.accuracies, seen.spots)
        kept = inside(model.accuracy_range, samples, seen)
        table = torch.stack((truth, seen.accuracies, low, high), dim=1)
        rows.append((name, table, kept, [s.group for s in samples]))
    if len(rows) > 1:
        joined = torch.cat([r[1] for r in rows]), torch.cat([r[2] for r in rows])
        rows.append(("all", *joined, [g for r in rows for g in r[3]]))
    for name, table, kept, groups in rows:
        yield _covered(name, table, kept, groups, draws)


def applicability(model: Shipped, pools: Mapping[str, Sequence[Sample]]) -> Iterator[Inside]:
    """Shares of networks inside the encoder's range, and the reasons of the others."""
    for name, samples in pools.items():
        excluded = [model.range.limits.excluded(s.graph) for s in samples]
        kept = inside(model.range, samples, model.see([s.graph for s in samples]))
        reasons = Counter(reason or "distance" for reason, own in zip(excluded, kept.tolist(), strict=True) if not own)
        text = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(2))
        yield Inside(name, len(samples), float(kept.double().mean()), text)


def inside(zone: Range, samples: Sequence[Sample], seen: Seen) -> Tensor:
    """Which networks lie in a range, limits and distances, ``(n,)`` of bool."""
    allowed = torch.tensor([not zone.limits.excluded(s.graph) for s in samples])
    return allowed & (zone.scores(seen.views) > LEAST)


# -------------------------------------------------------------------- retrieval


def _some(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Whole lineages, drawn until there are ``most`` networks."""
    if not 0 < most < len(samples):
        return list(samples)
    trees = lineages(samples)
    order = sorted(set(trees))
    random.Random(0).shuffle(order)
    kept: set[str] = set()
    count = 0
    for tree in order:
        if count >= most:
            break
        kept.add(tree)
        count += trees.count(tree)
    return [sample for sample, tree in zip(samples, trees, strict=True) if tree in kept]


def _asked(model: Shipped, pool: str, samples: list[Sample], draws: int) -> Iterator[Recall]:
    trees = np.array(lineages(samples))
    pooled = model.see([s.graph for s in samples])
    descriptors, functions = described([s.graph for s in samples]), _functions([s.graph for s in samples])
    for q in _questions(model, samples, pooled):
        asked, queries = q.wanted.any(1), int(q.wanted.any(1).sum())
        learned, plain = _far(model.vectors(q.queries), model.vectors(pooled)), _far(described(q.graphs), descriptors)
        computed, both = _apart(_functions(q.graphs), functions), blended(learned, plain)
        alike = np.isfinite(computed)
        auto = np.where(alike, with_function(np.where(alike, computed, 1), both), _LAST + both)
        measures = {"auto": auto, "function": computed, "both": both, "encoder": learned, "descriptor": plain}
        for measure, far in measures.items():
            first = _first_hit(far, q.wanted, q.left)[asked]
            figures = {k: _share(first < k, trees[asked], draws) for k in RANKS}
            yield Recall(pool, q.text, measure, queries, figures)
        chances = {k: float(_chance(q.wanted, q.left, k)[asked].mean()) for k in RANKS}
        yield Recall(pool, q.text, "chance", queries, {k: Interval(c, c, c) for k, c in chances.items()})


@dataclass(frozen=True, eq=False)
class _Question:
    """Networks that ask a pool, what each of them ``wanted`` of it, and what is ``left`` out: ``(queries, pool)``."""

    text: str
    wanted: Bools
    left: Bools
    queries: Seen
    graphs: Sequence[ParameterGraph]


def _questions(model: Shipped, samples: Sequence[Sample], pooled: Seen) -> Iterator[_Question]:
    """Every question that has an answer in a pool; ``pooled`` are its networks as they are seen."""

    def asked(
        text: str, wanted: Bools, left: Bools, queries: Seen, raw: Sequence[ParameterGraph]
    ) -> Iterator[_Question]:
        if wanted.any():
            yield _Question(text, wanted, left, queries, raw)

    graphs = [s.graph for s in samples]
    trees = np.array(lineages(samples))
    same_tree = trees[:, None] == trees[None, :]
    itself = np.eye(len(samples), dtype=bool)
    task = np.array([str(s.record.get("task", s.name)) for s in samples])
    same_task = task[:, None] == task[None, :]
    if not same_task.all():
        yield from asked("same task, another lineage", same_task & ~same_tree, same_tree, pooled, graphs)
    related = _related(samples)
    yield from asked("same parent", related & ~itself, itself, pooled, graphs)
    run = np.array([s.group for s in samples])
    same_run = (run[:, None] == run[None, :]) & ~itself
    generator = torch.Generator().manual_seed(0)
    moved = [rescale(permute(g, generator), generator) for g in graphs]
    again = model.see(moved), moved
    nothing = np.zeros_like(itself)
    yield from asked("permuted and rescaled copy", itself, nothing, *again)
    yield from asked("copy of a later or earlier checkpoint", same_run, itself, *again)
    parents = _parents(samples)
    yield from asked("fine-tuned copy", parents, itself, *again)
    for level in NOISES:
        noisy = [disturbed(permute(g, generator), level, generator, exactly=True) for g in graphs]
        yield from asked(f"copy with {level:.0%} noise", itself, nothing, model.see(noisy), noisy)


def _functions(graphs: Sequence[ParameterGraph]) -> tuple[Tensor, NDArray[np.str_]]:
    """Vectors of functions ``(n, LENGTH)`` and what was asked of each, "" where it could not be asked."""
    found = [function({name: graph.tensor(name) for name in graph.shapes}, graph.wiring) for graph in graphs]
    vectors = [np.zeros(LENGTH, np.float32) if one.vector is None else one.vector for one in found]
    asked = ["" if one.vector is None else one.asked for one in found]
    return torch.from_numpy(np.stack(vectors)), np.array(asked)


def _apart(queries: tuple[Tensor, NDArray[np.str_]], pool: tuple[Tensor, NDArray[np.str_]]) -> NDArray[np.float64]:
    """Distances of functions; infinite between networks that were not asked the same."""
    alike = (queries[1][:, None] == pool[1][None, :]) & (pool[1] != "")
    return np.where(alike, _far(queries[0], pool[0]), np.inf)


def _far(queries: Tensor, pool: Tensor) -> NDArray[np.float64]:
    return np.asarray(torch.cdist(queries.double(), pool.double()).numpy())


def _related(samples: Sequence[Sample]) -> Bools:
    """Siblings, parents and children of each other."""
    parent = np.array([str(s.record.get("parent") or "") for s in samples])
    siblings = (parent[:, None] == parent[None, :]) & (parent[:, None] != "")
    up = _parents(samples)
    return np.asarray(siblings | up | up.T, dtype=bool)


def _parents(samples: Sequence[Sample]) -> Bools:
    """Whether the network of a column is what that of the row was fine-tuned from."""
    parent = np.array([str(s.record.get("parent") or "") for s in samples])
    name = np.array([s.name for s in samples])
    return np.asarray(parent[:, None] == name[None, :], dtype=bool)


def _first_hit(far: NDArray[np.float64], wanted: Bools, left: Bools) -> NDArray[np.int64]:
    """Rank of the first relevant item, 0 for the nearest; ties count against; items in ``left`` are not offered."""
    offered = np.where(left & ~wanted, np.inf, far)
    best = np.where(wanted, far, np.inf).min(1, keepdims=True)
    return np.asarray(((offered <= best) & ~wanted).sum(1), dtype=np.int64)


def _chance(wanted: Bools, left: Bools, k: int) -> NDArray[np.float64]:
    """Probability that one of ``k`` items drawn at random is relevant."""
    good = wanted.sum(1).astype(float)
    total = (wanted | ~left).sum(1).astype(float)
    missed = np.ones(len(wanted))
    for j in range(k):
        missed *= np.clip(total - good - j, 0, None) / np.maximum(total - j, 1)
    return 1 - missed


def _share(hits: Bools, groups: NDArray[np.str_], draws: int) -> Interval:
    return metrics.bootstrap(lambda _, hit: float(hit.mean()), hits, hits, list(groups), draws)


# -------------------------------------------------------------------- intervals


def _covered(name: str, table: Tensor, kept: Tensor, groups: Sequence[str], draws: int) -> Coverage:
    share = float(kept.double().mean())
    if not bool(kept.any()):
        none = float("nan")
        return Coverage(name, len(table), share, Interval(none, none, none), none, none, none)
    truth, predicted, low, high = table[kept].T
    hit = ((truth >= low) & (truth <= high)).numpy()
    own = [g for g, keep in zip(groups, kept.tolist(), strict=True) if keep]
    return Coverage(
        name, len(table), share, _share(hit, np.array(own), draws), float((high - low).mean()),
        metrics.mean_absolute_error(truth, predicted), metrics.kendall_tau(truth, predicted),
    )  # fmt: skip



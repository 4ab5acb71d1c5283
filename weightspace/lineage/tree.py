"""The forest of a family: every network placed from the top down, then the cheapest arborescence.

A network starts above the roots and goes down step by step: at each network it either stays, as a child of it, or goes
on to one of its children, with the probabilities of a conditional logit (McFadden 1974) over ``geometry``'s features.
Its parent is where it stays; above the roots that means that its parent is not here. The logarithms of the products are
the costs of all edges, and the minimum arborescence (Chu & Liu 1965, Edmonds 1967) under one more node that stands for
"not here" is the likeliest forest. As the probabilities depend on the forest, that is repeated until nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from weightspace.lineage.geometry import Geometry, Index
from weightspace.lineage.sample import Array

OUTSIDE = -1
"""The parent of a network whose parent is not here."""
_ROUNDS = 6
_LEAST = math.log(1e-6)
_MANY = 128
_LEAST_OF_MANY = math.log(0.02)
"""Of more than ``_MANY`` networks fewer ways down are followed, and fewer rounds made."""
_NEVER = 50.0

Children = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Weights:
    """Coefficients of the two logits, in the order of ``geometry.DEEP`` and ``geometry.TOP``; see ``fitting``."""

    deep: tuple[float, ...]
    top: tuple[float, ...]


@dataclass(frozen=True)
class Forest:
    """``parents (n,)``: index or ``OUTSIDE``; ``likely (n,)``: probability of each, the others as they are.

    ``alternatives``: for each network the other parents with their probabilities, likeliest first.
    """

    parents: tuple[int, ...]
    likely: tuple[float, ...]
    log_likelihood: float
    alternatives: tuple[tuple[tuple[int, float], ...], ...]


def children_of(parents: Sequence[int]) -> dict[int, list[int]]:
    """Parent -> children."""
    found: dict[int, list[int]] = {}
    for child, parent in enumerate(parents):
        found.setdefault(parent, []).append(child)
    return found


def below(children: Children, top: int) -> list[int]:
    """A network and all of its descendants, parents before their children."""
    found = [top]
    for x in found:
        found.extend(children.get(x, ()))
    return found


def forest(geometry: Geometry, weights: Weights, blocked: Mapping[int, Collection[int]] | None = None) -> Forest:
    """The likeliest forest over a family; ``blocked``: network -> those that are not its parent."""
    import networkx as nx

    count = geometry.count
    if count == 1:
        return Forest((OUTSIDE,), (1.0,), 0.0, ((),))
    barred = blocked or {}
    parents = _first(geometry, weights, barred)
    chances: list[dict[int, float]] = []
    seen: set[tuple[int, ...]] = set()
    while tuple(parents) not in seen and len(seen) < (_ROUNDS if count <= _MANY else 2):
        seen.add(tuple(parents))
        children = children_of(parents)
        order = below(children, OUTSIDE)[1:]
        chances = [placements(geometry, children, parents, b, weights, barred.get(b, ()), order) for b in range(count)]
        graph = nx.DiGraph()
        for b, found in enumerate(chances):
            graph.add_edge(OUTSIDE, b, weight=_NEVER)
            for a, log_p in found.items():
                graph.add_edge(a, b, weight=min(-log_p, _NEVER))
        tree = nx.minimum_spanning_arborescence(graph)
        parents = [next(iter(tree.pred[b])) for b in range(count)]
    likely, others = [], []
    for b, found in enumerate(chances):
        odds = {a: math.exp(v) for a, v in found.items()}
        likely.append(odds.pop(parents[b], 0.0))
        others.append(tuple(sorted(odds.items(), key=lambda x: -x[1])[:4]))
    total = sum(math.log(max(v, 1e-22)) for v in likely)
    return Forest(tuple(parents), tuple(likely), total, tuple(others))


def placements(
    geometry: Geometry, children: Children, parents: Sequence[int], b: int, weights: Weights,
    barred: Collection[int] = (), order: Sequence[int] | None = None,
) -> dict[int, float]:  # fmt: skip
    """Log probabilities of the parents of ``b`` in a forest, its own descendants left out."""
    inside = {*below(children, b), *barred}
    nearest = closest(geometry, children, parents, b, order)
    least = _LEAST if geometry.count <= _MANY else _LEAST_OF_MANY
    found: dict[int, float] = {}
    stack = [(OUTSIDE, 0.0)]
    while stack:
        at, so_far = stack.pop()
        candidates = [a for a in children.get(at, ()) if a not in inside]
        logs = choice(geometry, at, candidates, b, nearest, weights)
        found[at] = so_far + float(logs[-1])
        stack.extend((a, so_far + float(v)) for a, v in zip(candidates, logs, strict=False) if so_far + v > least)
    return found


def closest(
    geometry: Geometry, children: Children, parents: Sequence[int], b: int, order: Sequence[int] | None = None
) -> Array:
    """Squared distance of ``b`` to the nearest of each network and its descendants; ``b`` and its own do not count.

    ``order``: all networks of the forest, parents before their children.
    """
    found: list[float] = geometry.squared[:, b].tolist()
    for x in below(children, b):
        found[x] = math.inf
    for x in reversed(below(children, OUTSIDE)[1:] if order is None else order):
        parent = parents[x]
        if parent != OUTSIDE and found[x] < found[parent]:
            found[parent] = found[x]
    return np.array(found)


def choice(
    geometry: Geometry, at: int, candidates: Sequence[int], b: int, nearest: Array, weights: Weights
) -> Array:
    """Log probabilities of going on from ``at`` to each candidate, and at the end of staying."""
    if not candidates:
        return np.zeros(1)
    a: Index = np.asarray(candidates, dtype=np.int64)
    if at == OUTSIDE:
        scores = geometry.top(a, b, nearest[a]) @ np.array(weights.top)
    else:
        scores = geometry.deep(at, a, b, nearest[a]) @ np.array(weights.deep)
    scores = np.append(scores, 0.0)
    return np.asarray(scores - np.logaddexp.reduce(scores))


def _first(geometry: Geometry, weights: Weights, barred: Mapping[int, Collection[int]]) -> list[int]:
    """A first forest: networks are placed one by one, outward."""
    children: dict[int, list[int]] = {}
    parents = [OUTSIDE] * geometry.count
    placed: list[int] = []
    for b in (int(i) for i in np.argsort(geometry.sign * geometry.norms, kind="stable")):
        nearest = closest(geometry, children, parents, b, placed)
        at = OUTSIDE
        while candidates := [a for a in children.get(at, ()) if a not in barred.get(b, ())]:
            best = int(choice(geometry, at, candidates, b, nearest, weights).argmax())
            if best == len(candidates):
                break
            at = candidates[best]
        parents[b] = at
        children.setdefault(at, []).append(b)
        placed.append(b)
    return parents


__all__ = ["OUTSIDE", "Forest", "Weights", "below", "children_of", "choice", "closest", "forest", "placements"]

"""The forest of a family: a conditional logit over the possible parents of each network, then an arborescence.

The parent of a network is one of its candidates, or not here, with the probabilities of a conditional logit (McFadden
1974) over ``geometry``'s features. Their logarithms are the costs of the edges, and the minimum arborescence (Chu & Liu
1965, Edmonds 1967) under one more node that stands for "not here" is the likeliest forest. What speaks for a candidate
depends on where the candidate itself descends from, so that this is repeated until nothing changes.
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
_ROUNDS = 8
_NEVER = 50.0


@dataclass(frozen=True)
class Weights:
    """Coefficients of the logit, in the order of ``geometry.FEATURES`` and ``OUTSIDE_FEATURES``; see ``fitting``."""

    inside: tuple[float, ...]
    outside: tuple[float, ...]


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


def below(children: Mapping[int, Sequence[int]], top: int) -> set[int]:
    """A network and all of its descendants."""
    found = [top]
    for x in found:
        found.extend(children.get(x, ()))
    return set(found)


def forest(geometry: Geometry, weights: Weights, blocked: Mapping[int, Collection[int]] | None = None) -> Forest:
    """The likeliest forest over a family; ``blocked``: network -> those that are not its parent."""
    import networkx as nx

    count = geometry.count
    if count == 1:
        return Forest((OUTSIDE,), (1.0,), 0.0, ((),))
    barred = blocked or {}
    parents = _first(geometry, barred)
    chances: list[tuple[Index, Array]] = []
    seen: set[tuple[int, ...]] = set()
    while tuple(parents) not in seen and len(seen) < _ROUNDS:
        seen.add(tuple(parents))
        children, now = children_of(parents), np.array(parents, dtype=np.int64)
        chances = [choice(geometry, now, b, below(children, b), weights, barred.get(b, ())) for b in range(count)]
        graph = nx.DiGraph()
        for b, (candidates, log_p) in enumerate(chances):
            graph.add_edge(OUTSIDE, b, weight=min(-float(log_p[-1]), _NEVER))
            for a, value in zip(candidates, log_p, strict=False):
                graph.add_edge(int(a), b, weight=min(-float(value), _NEVER))
        tree = nx.minimum_spanning_arborescence(graph)
        parents = [next(iter(tree.pred[b])) for b in range(count)]
    likely, others = [], []
    for b, (candidates, log_p) in enumerate(chances):
        odds = dict(zip([*map(int, candidates), OUTSIDE], np.exp(log_p).tolist(), strict=True))
        likely.append(odds.pop(parents[b], 0.0))
        others.append(tuple(sorted(odds.items(), key=lambda x: -x[1])[:4]))
    total = sum(math.log(max(v, 1e-22)) for v in likely)
    return Forest(tuple(parents), tuple(likely), total, tuple(others))


def choice(
    geometry: Geometry, parents: Index, b: int, inside: set[int], weights: Weights, barred: Collection[int] = ()
) -> tuple[Index, Array]:
    """Candidates for the parent of ``b`` and their log probabilities, last that of none; ``inside``: its descendants.

    Where descendants stand in its way, a candidate is the parent of ``b`` only if they move: it counts all the same.
    """
    candidates = geometry.candidates(b)
    candidates = candidates[~np.isin(candidates, [b, *barred])]
    own = parents[candidates]
    # A candidate below b is judged by what is above b, as if b were not there.
    for _ in range(geometry.count):
        under = np.isin(own, list(inside))
        if not under.any():
            break
        own = np.where(under, np.where(own == OUTSIDE, OUTSIDE, parents[own]), own)
    scores = geometry.features(own, candidates, b) @ np.array(weights.inside)
    logs = np.append(scores, geometry.outside(b) @ np.array(weights.outside))
    return candidates, np.asarray(logs - np.logaddexp.reduce(logs))


def _first(geometry: Geometry, barred: Mapping[int, Collection[int]]) -> list[int]:
    """A first forest: each network under the nearest that it drifts away from, outward."""
    parents = []
    for b in range(geometry.count):
        order = geometry.near[b]
        order = order[~np.isin(order, list(barred.get(b, ())))]
        outward = order[geometry.drift[order, b] > 0.3]
        parents.append(int(outward[0]) if len(outward) else OUTSIDE)
    return parents


__all__ = ["OUTSIDE", "Forest", "Weights", "below", "children_of", "choice", "forest"]

"""Coefficients of ``tree``'s logits, fitted to families whose descent is known.

Each decision on the way down a recorded tree is an example: at an ancestor, which child (or none) leads on. Families
are also thinned out at random, with what is left attached to the nearest ancestor that is still there, so that missing
parents and missing roots are among the examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from weightspace.lineage.geometry import DEEP, TOP, Geometry
from weightspace.lineage.sample import Array
from weightspace.lineage.tree import OUTSIDE, Weights, below, children_of, closest


@dataclass(frozen=True, eq=False)
class Known:
    """A family and its recorded parents (index or ``OUTSIDE``)."""

    geometry: Geometry
    parents: tuple[int, ...]


def thinned(known: Known, keep: Sequence[int]) -> Known:
    """Some of a family, attached to the nearest ancestors that are kept."""
    kept = {old: new for new, old in enumerate(keep)}

    def up(i: int) -> int:
        parent = known.parents[i]
        while parent != OUTSIDE and parent not in kept:
            parent = known.parents[parent]
        return kept.get(parent, OUTSIDE)

    return Known(known.geometry.subset(keep), tuple(up(i) for i in keep))


def thinnings(known: Known, count: int, rng: np.random.Generator, missing: float = 0.2) -> Iterator[Known]:
    """A family ``count`` times with a third of its networks gone, in a share ``missing`` of the cases the root as well.

    Versions of which no two networks are left are passed over.
    """
    for _ in range(count):
        kept = rng.random(len(known.parents)) > 0.35
        if rng.random() < missing:
            kept &= np.array([p != OUTSIDE for p in known.parents])
        if kept.sum() > 1:
            yield thinned(known, [int(i) for i in np.flatnonzero(kept)])


def fit(
    families: Sequence[Known], versions: int = 6, missing: float = 0.2, seed: int = 0, decay: float = 1e-3
) -> Weights:
    """Fit both logits by maximum likelihood with a small quadratic penalty.

    Of each family thinned ``versions`` are added (see ``thinnings``). A family weighs as the square root of its number
    of networks.
    """
    rng = np.random.default_rng(seed)
    deep: list[Example] = []
    top: list[Example] = []
    for known in families:
        for version in (known, *thinnings(known, versions, rng, missing)):
            _examples(version, deep, top, len(version.parents) ** -0.5)
    return Weights(_logit(deep, len(DEEP), decay), _logit(top, len(TOP), decay))


Example = tuple[Array, int, float]
"""Features of the candidates, which of them is right (their number for none), and the weight of the example."""


def _examples(known: Known, deep: list[Example], top: list[Example], weight: float) -> None:
    """Every decision on the way down to every network."""
    children = children_of(known.parents)
    for b in range(len(known.parents)):
        inside = set(below(children, b))
        nearest = closest(known.geometry, children, known.parents, b)
        path = [b]
        while path[-1] != OUTSIDE:
            path.append(known.parents[path[-1]])
        for at, after in zip(path[:0:-1], [*path[-2:0:-1], None], strict=True):
            candidates = np.array([a for a in children.get(at, ()) if a not in inside], dtype=np.int64)
            if not len(candidates):
                continue
            label = len(candidates) if after is None else int(np.flatnonzero(candidates == after)[0])
            if at == OUTSIDE:
                top.append((known.geometry.top(candidates, b, nearest[candidates]), label, weight))
            else:
                deep.append((known.geometry.deep(at, candidates, b, nearest[candidates]), label, weight))


def _logit(examples: Sequence[Example], width: int, decay: float) -> tuple[float, ...]:
    if not examples:
        return (0.0,) * width
    most = max(len(x) for x, *_ in examples)
    features = torch.zeros(len(examples), most + 1, width, dtype=torch.float64)
    hidden = torch.ones(len(examples), most + 1, dtype=torch.bool)
    hidden[:, most] = False
    labels = torch.zeros(len(examples), dtype=torch.long)
    for i, (x, label, _) in enumerate(examples):
        features[i, : len(x)] = torch.from_numpy(x)
        hidden[i, : len(x)] = False
        labels[i] = most if label == len(x) else label
    share = torch.tensor([w for *_, w in examples], dtype=torch.float64)
    share /= share.sum()
    weights = torch.zeros(width, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=400, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        scores = (features @ weights).masked_fill(hidden, -1e9)
        each = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
        found = (share * each).sum() + decay * weights.square().sum()
        found.backward()
        return found

    search.step(loss)
    return tuple(round(float(w), 3) for w in weights.detach())


__all__ = ["Known", "fit", "thinned", "thinnings"]

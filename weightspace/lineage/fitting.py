"""Coefficients of ``tree``'s logit, fitted to families whose descent is known.

Each network of a recorded tree is an example: which of the candidates (or none) is its parent, the others being where
they are. Families are also thinned out at random, with what is left attached to the nearest ancestor that is still
there, so that missing parents and missing roots are among the examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from weightspace.lineage.geometry import FEATURES, OUTSIDE_FEATURES, Geometry
from weightspace.lineage.sample import Array
from weightspace.lineage.tree import OUTSIDE, Weights, below, children_of


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


def fit(
    families: Sequence[Known], thinnings: int = 6, missing: float = 0.2, seed: int = 0, decay: float = 1e-3
) -> Weights:
    """Fit by maximum likelihood with a small quadratic penalty.

    ``thinnings`` of each family are added, the roots of a share ``missing`` of them taken away. A family weighs as the
    square root of its number of networks.
    """
    rng = np.random.default_rng(seed)
    examples: list[tuple[Array, Array, int, float]] = []
    for known in families:
        versions = [known]
        for _ in range(thinnings):
            kept = rng.random(len(known.parents)) > 0.35
            if rng.random() < missing:
                kept &= np.array([p != OUTSIDE for p in known.parents])
            if kept.sum() > 1:
                versions.append(thinned(known, [int(i) for i in np.flatnonzero(kept)]))
        for version in versions:
            found = _examples(version)
            examples.extend((*x, len(found) ** -0.5) for x in found)
    return _logit(examples, decay)


def _examples(known: Known) -> list[tuple[Array, Array, int]]:
    children, parents = children_of(known.parents), np.array(known.parents, dtype=np.int64)
    found = []
    for b in range(len(known.parents)):
        inside = below(children, b)
        candidates = np.array([a for a in known.geometry.candidates(b) if a not in inside], dtype=np.int64)
        at = np.flatnonzero(candidates == known.parents[b])
        if known.parents[b] != OUTSIDE and not len(at):
            continue
        label = int(at[0]) if len(at) else len(candidates)
        found.append((known.geometry.features(parents[candidates], candidates, b), known.geometry.outside(b), label))
    return found


def _logit(examples: Sequence[tuple[Array, Array, int, float]], decay: float) -> Weights:
    wide, most = len(FEATURES), max(len(x) for x, *_ in examples)
    features = torch.zeros(len(examples), most, wide, dtype=torch.float64)
    hidden = torch.ones(len(examples), most + 1, dtype=torch.bool)
    hidden[:, most] = False
    labels = torch.zeros(len(examples), dtype=torch.long)
    for i, (x, _, label, _) in enumerate(examples):
        features[i, : len(x)] = torch.from_numpy(x)
        hidden[i, : len(x)] = False
        labels[i] = most if label == len(x) else label
    outside = torch.from_numpy(np.stack([z for _, z, _, _ in examples]))
    share = torch.tensor([w for *_, w in examples], dtype=torch.float64)
    share /= share.sum()
    weights = torch.zeros(wide + len(OUTSIDE_FEATURES), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=400, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        scores = torch.cat([features @ weights[:wide], (outside @ weights[wide:]).unsqueeze(1)], dim=1)
        each = torch.nn.functional.cross_entropy(scores.masked_fill(hidden, -1e9), labels, reduction="none")
        found = (share * each).sum() + decay * weights.square().sum()
        found.backward()
        return found

    search.step(loss)
    kept = [round(float(w), 3) for w in weights.detach()]
    return Weights(tuple(kept[:wide]), tuple(kept[wide:]))


__all__ = ["Known", "fit", "thinned"]

"""Which networks of a group are relatives at all: correlation weight by weight, against a null of the symmetry group.

The statistic is that of ``weightspace.mergeability.ancestry``: independent networks are as likely as any networks of
their orbits, so that the correlation with random group elements applied is what unrelated networks have. Here the null
is drawn once for a whole group of networks and all pairs are held against it, with Bonferroni's correction; only a pair
that is not far outside is looked at again by the test of the pair itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightspace.lineage.sample import Floats, Sample
from weightspace.mergeability.ancestry import _origins

ALPHA = 0.01
"""Chance of a single false link in a whole group of strangers."""
_DRAWS = 31
_MOVED = 8
_HELD = 64
_BLOCK = 1024


@dataclass(frozen=True)
class Null:
    """Correlations of unrelated networks of a group: ``mean``, ``deviation``, and where they were drawn from."""

    mean: float
    deviation: float
    drawn: int
    kind: str

    def log10_p(self, correlation: float) -> float:
        """log10 of the chance that unrelated networks correlate so much: Student's t with few degrees of freedom.

        Draws of one group element over many pairs depend on each other; the degrees are those of the elements alone.
        """
        from scipy.stats import t as student

        if self.deviation <= 0:
            return 0.0
        found = float(student.logsf((correlation - self.mean) / self.deviation, _DRAWS - 1)) / math.log(10)
        return max(found, -300.0) if math.isfinite(found) else -300.0

    def least(self, pairs: int) -> float:
        """Correlation above which a pair counts as related, one false link in ``pairs`` having chance ``ALPHA``."""
        from scipy.stats import t as student

        return self.mean + self.deviation * float(student.isf(ALPHA / max(pairs, 1), _DRAWS - 1))


def null(sample: Sample, network: Callable[[int], Mapping[str, Tensor]], unit: Floats, seed: int = 0) -> Null:
    """Draw the null of a group; ``network(i)`` gives the tensors of network ``i``, ``unit`` is ``sample.standardised``.

    Without a wiring the entries of each tensor are shuffled, which keeps less of a network's structure.
    """
    rng = np.random.default_rng(seed)
    usable = np.flatnonzero(sample.known)
    segments = [s for s in sample.segments if s.movable]
    if len(usable) < 1 or not segments:
        return Null(0.0, 0.0, 0, "none")
    moved = [int(i) for i in rng.permutation(usable)[:_MOVED]]
    held = rng.permutation(usable)[:_HELD]
    generator = torch.Generator().manual_seed(seed + 1)
    elements = [None if sample.wiring is None else sample.wiring.random(generator) for _ in range(_DRAWS)]
    rows = np.zeros((_DRAWS, len(moved), unit.shape[1]), dtype=np.float32)
    start = 0
    for s in segments:
        stop = start + s.stop - s.start
        flat = [_standard(network(i)[s.tensor].detach().to(torch.float32).reshape(-1)) for i in moved]
        for k, element in enumerate(elements):
            if element is None or sample.wiring is None:
                at = torch.randint(len(flat[0]), (len(s.positions),), generator=generator)
            else:
                at = _origins(sample.wiring, s.tensor, s.positions, element)
            for j, x in enumerate(flat):
                rows[k, j, start:stop] = x[at].numpy()
        start = stop
    scale = np.sqrt((rows * rows).sum(-1, keepdims=True))
    rows /= np.maximum(scale, 1e-12)
    values = [unit[held] @ rows[k].T for k in range(_DRAWS)]
    drawn = np.stack(values).astype(np.float64)
    # A pair's own spread, and how far the centres of different pairs lie apart.
    deviation = math.sqrt(float(drawn.var(axis=0, ddof=1).max()))
    kind = "shuffled entries" if sample.wiring is None else "symmetry group"
    return Null(float(drawn.mean(axis=0).max()), max(deviation, 1e-9), drawn.size, kind)


def families(
    unit: Floats, known: NDArray[np.bool_], drawn: Null, confirm: Callable[[int, int], bool] | None = None
) -> list[list[int]]:
    """Networks in families, each network in one.

    Pairs are joined from the highest correlation down. ``confirm``: the test of the pair itself, asked where a pair
    joins two families and its correlation is no more than three times what counts; two families are asked about once.
    """
    count = len(unit)
    usable = int(known.sum())
    least = drawn.least(usable * (usable - 1) // 2) if drawn.deviation > 0 else 1.0
    found: list[tuple[float, int, int]] = []
    for start in range(0, count, _BLOCK):
        block = unit[start : start + _BLOCK] @ unit.T
        for i, j in np.argwhere(block > least):
            if start + i < j and known[start + i] and known[j]:
                found.append((float(block[i, j]), int(start + i), int(j)))
    parent = list(range(count))

    def top(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    asked: set[tuple[int, int]] = set()
    for value, i, j in sorted(found, reverse=True):
        a, b = sorted((top(i), top(j)))
        if a == b:
            continue
        if value < 3 * least and confirm is not None:
            if (a, b) in asked:
                continue
            asked.add((a, b))
            if not confirm(i, j):
                continue
        parent[b] = a
    groups: dict[int, list[int]] = {}
    for i in range(count):
        groups.setdefault(top(i), []).append(i)
    return list(groups.values())


def _standard(x: Tensor) -> Tensor:
    x = x - x.mean()
    return x / x.square().mean().sqrt().clamp_min(1e-12)


__all__ = ["ALPHA", "Null", "families", "null"]

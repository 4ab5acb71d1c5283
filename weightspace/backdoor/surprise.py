"""How much stands out against clean networks of the same kind, whichever test it shows in.

What is learned from some attacks need not serve for others: their traces lie in other tests. Here every family of
tests is told in one unit, how far it lies beyond what clean networks of the same kind show among each other, and these
numbers are put in order of size, so that nobody can learn which of them it was. What is learned from it is only how
large the largest, the second, … have to be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from weightspace.backdoor.null import FEWEST, cauchy, tails

Array = NDArray[np.float64]

FAMILIES = (("row_", "bias"), ("share_", "path_"), ("noise_", "margin", "universal", "patch"), ("stamp",), ("word_",))
"""Beginnings of the names of tests that are alike."""
NUMBERS = ("channel_isolation", "channel_leading", "channel_lipschitz", "gap_largest", "away", "conductance")
"""Beginnings of the names of statistics of whole networks that a backdoor moves."""
FALLING = ("conductance",)
"""Those that it lowers."""
SUMMARY = 9
_LOW, _HIGH = -4.0, 12.0


def families(names: Sequence[str], judged: Array, answers: Array, groups: Sequence[str]) -> Array:
    """Of every class how far each family of tests lies from clean networks, ``(K, families)``.

    ``judged (K, 2 tests)`` as ``References.judge`` gives it for tests ``names``; ``answers (K, 2 groups)`` as
    ``References.answers`` gives it for these ``groups``.
    """
    count = len(names)
    found = []
    for beginnings in FAMILIES:
        own = [i for i, n in enumerate(names) if n.startswith(beginnings)]
        for start in (0, count):
            part = np.clip(judged[:, [start + i for i in own]], -3, 6)
            found.append(part.mean(1) if own else np.zeros(len(judged)))
    for change in dict.fromkeys(g.split()[0] for g in groups):
        own = [i for i, g in enumerate(groups) if g.startswith(change)]
        found += [answers[:, own].mean(1), answers[:, [len(groups) + i for i in own]].mean(1)]
    found.append(answers[:, : len(groups)].mean(1) if groups else np.zeros(len(judged)))
    return np.stack(found, 1)


def tops(found: Array) -> Array:
    """What stands out most in each family ``(K, families) -> (families + 1,)``; last the class that does in most."""
    told = found[:, np.abs(found).max(0) > 0]
    joined = np.clip(told, -3, 6).mean(1).max() if told.shape[1] else 0.0
    return np.append(found.max(0), joined)


def beyond(own: Array, usual: Array) -> Array:
    """How far ``tops (families + 1,)`` lie beyond those of clean networks ``(n, families + 1)``."""
    found: Array = np.clip((own - usual.mean(0)) / (usual.std(0) + 0.3), _LOW, _HIGH)
    return found


def rarity(own: Array, usual: Array, numbers: Array) -> float:
    """-log10 of one p-value: of ``tops`` among those of clean networks and of ``numbers``, deviations of the whole.

    Each is held against the tail that few values let one expect (``null.tails``); they are joined by the Cauchy
    combination.
    """
    from scipy.stats import norm

    told = usual.std(0) > 0 if len(usual) >= FEWEST else np.zeros(len(own), dtype=bool)
    p = np.concatenate((tails(usual[:, told], own[told]) if told.any() else np.zeros(0), norm.sf(numbers)))
    return float(-np.log10(cauchy(p))) if len(p) else 0.0


def summary(surprises: Array, rare: float) -> Array:
    """Numbers in order of size, and how many are large, ``(SUMMARY,)``; nothing of which is which.

    ``rare``: what ``rarity`` says of all of them.
    """
    x = np.sort(surprises)[::-1] if len(surprises) else np.zeros(1)
    at = [x[k] if len(x) > k else 0.0 for k in (0, 1, 2, 4)]
    return np.array([*at, x[:8].mean(), x.mean(), (x > 2).sum(), (x > 4).sum(), rare], dtype=np.float64)


def of_network(names: Sequence[str], numbers: Array) -> Array:
    """Deviations of statistics of the whole network that a backdoor moves, larger being more suspicious."""
    chosen = [(i, -1.0 if n in FALLING else 1.0) for i, n in enumerate(names) if n.startswith(NUMBERS)]
    found: Array = np.clip(np.array([sign * numbers[i] for i, sign in chosen]), _LOW, _HIGH)
    return found


__all__ = ["SUMMARY", "beyond", "families", "of_network", "rarity", "summary", "tops"]

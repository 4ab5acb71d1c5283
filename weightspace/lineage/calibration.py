"""Everything that lineage was calibrated for, from families of known descent: what ``calibrated.json`` holds.

The logits are fitted to all families. Handicaps of the regimes and confidences need forests of families that were not
fitted to: those are found in folds, each with the logits of the other folds, for every family as it is and thinned out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from weightspace.lineage.confidence import features
from weightspace.lineage.fitting import Known, fit, thinnings
from weightspace.lineage.placing import chosen, read
from weightspace.lineage.sample import Array
from weightspace.lineage.tree import OUTSIDE, Forest, Weights

NAMES = ("steps of any kind", "tasks learnt one after the other", "many children of one base")
_FOLDS = 5
_HANDICAPS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
_SHARES = (1.0, 0.5, 0.15)
"""What a family counts as it is, with some of its networks gone, and with its root gone."""


@dataclass(frozen=True, eq=False)
class Read:
    """A family with its forests in each regime, forward and with time turned around."""

    known: Known
    ahead: tuple[Forest, ...]
    back: tuple[Forest, ...]
    share: float


def calibrate(made: Sequence[Known], recorded: Sequence[Known], say: Callable[[str], None]) -> dict[str, Any]:
    """Fit to families that were ``made`` for it and to ``recorded`` trees of populations; ``say`` prints figures."""
    whole = _weights(made, recorded)
    held = list(_held(made, recorded))
    handicaps = _handicaps(held, len(made), say)
    rows: list[list[Array]] = [[], []]
    truths: list[list[Array]] = [[], []]
    shares: list[list[Array]] = [[], []]
    for _, one in held:
        found, turned = chosen(one.ahead, one.back, handicaps)
        shape = one.known.geometry.turned() if turned else one.known.geometry
        edge, way = features(shape, found, [f.parents for f in (one.back if turned else one.ahead)])
        if not len(edge):
            continue
        pairs = [(p, b) for b, p in enumerate(found.parents) if p != OUTSIDE]
        right = np.array([one.known.parents[b] == p for p, b in pairs])
        linked = right | np.array([one.known.parents[p] == b for p, b in pairs])
        for k, (values, truth) in enumerate(((edge, right), (way[linked], right[linked]))):
            rows[k].append(values)
            truths[k].append(truth)
            shares[k].append(np.full(len(truth), one.share * max(len(truth), 1) ** -0.5))
    fitted = [_logistic(np.concatenate(rows[k]), np.concatenate(truths[k]), np.concatenate(shares[k])) for k in (0, 1)]
    for k, what in enumerate(("parents", "directions")):
        truth = np.concatenate(truths[k])
        say(f"confidence of {what}: {len(truth)} edges of families not fitted to, {truth.mean():.0%} right")
    regimes = [
        {"name": n, "deep": list(w.deep), "top": list(w.top), "handicap": h}
        for n, w, h in zip(NAMES, whole, handicaps, strict=True)
    ]
    return {"regimes": regimes, "confidence": fitted[0], "direction": fitted[1]}


def _weights(made: Sequence[Known], recorded: Sequence[Known]) -> tuple[Weights, ...]:
    """Of the three regimes: all families; recorded trees; of these the stars."""
    first = fit([*made, *recorded])
    stars = [t for t in recorded if len({p for p in t.parents if p != OUTSIDE}) == 1]
    return first, Weights(fit(recorded).deep, first.top), Weights(fit(stars or recorded).deep, first.top)


def _held(made: Sequence[Known], recorded: Sequence[Known]) -> Iterator[tuple[int, Read]]:
    rng = np.random.default_rng(0)
    for fold in range(_FOLDS):
        weights = _weights(
            [k for i, k in enumerate(made) if i % _FOLDS != fold],
            [k for i, k in enumerate(recorded) if i % _FOLDS != fold],
        )
        for i, known in enumerate([*made, *recorded]):
            if (i if i < len(made) else i - len(made)) % _FOLDS != fold:
                continue
            for version, share in _versions(known, rng):
                yield i, Read(version, *read(version.geometry, weights), share)


def _versions(known: Known, rng: np.random.Generator, count: int = 3) -> Iterator[tuple[Known, float]]:
    yield known, _SHARES[0]
    for thin in thinnings(known, count, rng):
        yield thin, _SHARES[1] if sum(p == OUTSIDE for p in thin.parents) == 1 else _SHARES[2]


def _handicaps(held: Sequence[tuple[int, Read]], made: int, say: Callable[[str], None]) -> tuple[float, ...]:
    """What gives the best edges, families made for it and recorded ones counting the same."""

    def score(handicaps: Sequence[float]) -> float:
        total = 0.0
        for group in ([r for i, r in held if i < made], [r for i, r in held if i >= made]):
            right = found = true = 0
            for one in group:
                parents = chosen(one.ahead, one.back, handicaps)[0].parents
                right += sum(a == b != OUTSIDE for a, b in zip(parents, one.known.parents, strict=True))
                found += sum(a != OUTSIDE for a in parents)
                true += sum(b != OUTSIDE for b in one.known.parents)
            total += 2 * right / max(found + true, 1)
        return total / 2

    best = max(((0.0, *h) for h in product(_HANDICAPS, repeat=len(NAMES) - 1)), key=lambda h: (score(h), -sum(h)))
    say(f"handicaps {best}: edge F1 {score(best):.3f} on families not fitted to, thinned ones among them")
    return best


def _logistic(rows: Array, truth: Array, shares: Array) -> list[float]:
    """Logistic regression on standardised features with a unit quadratic penalty, told in the features' own units."""
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(truth)) < 2:
        # Nothing to tell apart: the rule of succession.
        share = (float(truth.sum()) + 1) / (len(truth) + 2)
        return [round(float(np.log(share / (1 - share))), 4), *[0.0] * (rows.shape[1] - 1)]
    centre, spread = rows[:, 1:].mean(0), np.maximum(rows[:, 1:].std(0), 1e-9)
    model = LogisticRegression(C=1.0, max_iter=3000)
    model.fit((rows[:, 1:] - centre) / spread, truth, sample_weight=shares)
    weights = model.coef_[0] / spread
    return [round(float(v), 4) for v in (float(model.intercept_[0]) - float(weights @ centre), *weights)]


__all__ = ["NAMES", "Read", "calibrate"]

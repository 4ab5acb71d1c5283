"""What merges are expected to retain by one method: the prior's mean, measurements, intervals, and what moved them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from weightspace.mergeability.features import Comparison
from weightspace.mergeability.measurements import BARRIER, Measurement
from weightspace.mergeability.outcome import (
    CEILING,
    Cells,
    Observed,
    Outcome,
    Posterior,
    effect_terms,
    link,
    outcome_interval,
    retained,
    unlink,
)
from weightspace.mergeability.prior import COVERAGE
from weightspace.mergeability.report import Prediction
from weightspace.pretrained.applicability import Applicability

if TYPE_CHECKING:
    from weightspace.mergeability.prior import Prior

Array = NDArray[np.float64]
Explain = Callable[[int], Mapping[str, float]]
"""What moved the prediction of a merge, by its number."""
State = tuple[Outcome, Observed | None]
"""The effects of one method and what was observed of them."""

JOINT = 64
"""Models whose pairs have a common posterior, so that measured merges of some tell of the others."""
GUESS = 0.8
"""What a merge is taken to retain where nothing was learned about it."""


@dataclass(frozen=True, eq=False)
class Merges:
    """Merges that something is to be said about: ``sets`` of models (numbers in ``names``) with their ``cells``.

    ``inside``: for each, whether the ``prior`` speaks of it; ``seen_as``: the comparison that holds its features, and
    its models' numbers there. ``measured``: merges of these models, under these names.
    """

    names: tuple[str, ...]
    sets: Sequence[tuple[int, ...]]
    cells: Cells
    prior: Prior
    inside: Sequence[Applicability]
    seen_as: Mapping[tuple[int, ...], tuple[Comparison, tuple[int, ...]]]
    measured: Sequence[Measurement]

    @property
    def joint(self) -> bool:
        """Whether they are few enough for a common posterior."""
        return len(self.names) <= JOINT


def predict(
    merges: Merges, method: str, expected: Array, agreed: Observed | None = None
) -> tuple[list[Prediction], Explain, State | None]:
    """Predictions of all merges by one method, what moved one of them, and the effects they came from.

    ``expected``: of every cell, by the prior, on the link scale. ``agreed``: what was observed on inputs.
    """
    if not merges.joint:
        return _apart(merges, method, expected)
    seen = [m for m in merges.measured if m.method == method]
    observed = _both(_observed(merges, method, seen, expected), agreed)
    outside = not any(a.inside for a in merges.inside)
    if outside and observed is not None:
        # What was learned says nothing here: only what was measured counts, with effects of its own.
        expected = np.full(len(merges.cells), float(link(np.array([GUESS]))[0]))
        observed = _both(_observed(merges, method, seen, expected), agreed)
        assert observed is not None
        model = _flat(merges.cells, expected, observed)
    else:
        variances = dict(merges.prior.variances[method])
        # What a base and its tasks have in common: learned within families, so at least as a model's own effect.
        variances.setdefault("level", variances.get("vulnerability", 0.05))
        model = Outcome(tuple(t for t in effect_terms(merges.cells) if t.name in variances), variances, expected)
    before, after = model.posterior(), model.posterior(observed)
    done = {frozenset(m.models): m for m in seen}
    found = []
    for s, members in enumerate(merges.sets):
        exact = done.get(frozenset(merges.names[i] for i in members))
        if exact is not None:
            by_model = dict(zip(exact.models, exact.retained, strict=False))
            value, inside = exact.outcome, merges.inside[s]
            found.append(Prediction(method, value, value, value, COVERAGE, by_model, {}, inside, True))
        elif not merges.inside[s].inside and observed is None:
            found.append(_nothing(method, merges.inside[s]))
        else:
            found.append(_one(merges, s, method, before, after, outside))

    def explain(s: int) -> Mapping[str, float]:
        at = merges.cells.where(s)
        if outside:
            change = retained(after, at) - retained(before, at)
            return {"measured merges": -change if method == BARRIER else change}
        return _moved(merges, s, method, after.mean[at], before.mean[at])

    return found, explain, None if outside and observed is None else (model, observed)


def _one(merges: Merges, s: int, method: str, before: Posterior, after: Posterior, outside: bool) -> Prediction:
    """One merge: by the prior less what measurements tell, or (``outside``) by measurements alone."""
    at = merges.cells.where(s)
    if outside:
        value, reach = retained(after, at), outcome_interval(after, at, COVERAGE)
        return _prediction(merges, s, method, value, *reach, unlink(after.mean[at]))
    variance = float(np.diag(after.covariance)[at].sum() / np.maximum(np.diag(before.covariance), 1e-12)[at].sum())
    return _expected(merges, s, method, after.mean[at], math.sqrt(max(variance, 0.0)))


def _apart(
    merges: Merges, method: str, expected: Array
) -> tuple[list[Prediction], Explain, State | None]:
    """Of many models: each merge by itself, as the prior has it."""
    at = merges.cells.where
    every = [
        _expected(merges, s, method, expected[at(s)], 1.0) if inside.inside else _nothing(method, inside)
        for s, inside in enumerate(merges.inside)
    ]

    def alone(s: int) -> Mapping[str, float]:
        return _moved(merges, s, method, expected[at(s)], expected[at(s)])

    return every, alone, None


def _expected(merges: Merges, s: int, method: str, mean: Array, left: float) -> Prediction:
    """A prediction with a conformal interval, of which ``left`` is left after measurements."""
    value = float(unlink(mean).mean())
    reach = float(merges.prior.spreads[method].reach(np.array([value]), COVERAGE)[0]) * left
    return _prediction(merges, s, method, value, max(value - reach, 0.0), min(value + reach, CEILING), unlink(mean))


def _moved(merges: Merges, s: int, method: str, mean: Array, before: Array) -> dict[str, float]:
    """By how much each kind of feature, and measured merges, moved a prediction: in what is retained (or lost)."""
    value = float(unlink(before).mean())
    moved = {
        name: value - float(unlink(before - t).mean())
        for name, t in merges.prior.terms(*merges.seen_as[merges.sets[s]], method).items()
    }
    moved["measured merges"] = float(unlink(mean).mean()) - value
    return {name: -t for name, t in moved.items()} if method == BARRIER else moved


def _prediction(
    merges: Merges, s: int, method: str, value: float, low: float, high: float, by_model: Array
) -> Prediction:
    inside = merges.inside[s]
    if method == BARRIER:
        return Prediction(method, 1 - value, 1 - high, 1 - low, COVERAGE, {}, {}, inside)
    kept = {merges.names[i]: float(v) for i, v in zip(merges.sets[s], by_model, strict=True)}
    return Prediction(method, value, low, high, COVERAGE, kept, {}, inside)


def _nothing(method: str, inside: Applicability) -> Prediction:
    nan = float("nan")
    return Prediction(method, nan, nan, nan, COVERAGE, {}, {}, inside)


def _both(one: Observed | None, other: Observed | None) -> Observed | None:
    return other if one is None else one if other is None else one.and_(other)


def _observed(
    merges: Merges, method: str, measured: Sequence[Measurement], expected: Array
) -> Observed | None:
    """What was measured by one method, on the link scale."""
    observed: Observed | None = None
    names, sets, cells = merges.names, merges.sets, merges.cells
    for m in measured:
        order = [names.index(x) for x in m.models]
        at = cells.where(sets.index(tuple(sorted(order))))
        if m.retained and method != BARRIER:
            which = np.array([int(at[[cells.own[c] for c in at].index(i)]) for i in order])
            row = Observed.cells(which, np.array(m.retained), len(cells))
        else:
            row = _averaged(at, 1 - m.outcome if method == BARRIER else m.outcome, expected, len(cells))
        observed = _both(observed, row)
    return observed


def _flat(cells: Cells, expected: Array, observed: Observed) -> Outcome:
    """Effects of models and merges that nothing is known of but what was measured."""
    model = Outcome.start(effect_terms(cells), expected)
    if len(observed.values) >= 3:
        return model.fit(observed)
    unit = 0.36
    return replace(model, variances={name: unit * v for name, v in model.variances.items()})


def _averaged(at: NDArray[np.int64], outcome: float, expected: Array, total: int) -> Observed:
    """A mean over cells, made linear where it is expected to be; shifted so that the expectation has its value."""
    level = unlink(expected[at]).mean()
    shifted = unlink(expected[at]) + outcome - level
    t = link(shifted)
    slope = np.maximum(CEILING - shifted, 0.02)
    weight = slope / slope.sum()
    design = np.zeros((1, total))
    design[0, at] = weight
    return Observed(design, np.array([float(weight @ t)]), np.array([1e-3]))


__all__ = ["GUESS", "JOINT", "Explain", "Merges", "State", "predict"]

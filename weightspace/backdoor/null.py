"""From numbers per class to one p-value: how far the most extreme class stands out, and what clean networks show.

Without a reference, the classes of one network are the sample: the largest is compared with the others by the test of
one outlier in a normal sample (Grubbs 1950), which knows how few there are. Tests that depend on each other are
combined by the Cauchy combination (Liu & Xie, JASA 2020). Classes are not alike even in clean networks, so these
p-values are only as good as that assumption; with clean networks of the same family (``null_from``) they are
calibrated against what those show.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from weightspace.backdoor.responses import beside, group_numbers
from weightspace.backdoor.stamps import STAMP_TESTS
from weightspace.errors import WeightspaceError

Array = NDArray[np.float64]

SMALLEST = 1e-15
CERTAIN = 0.99
"""Bounds of p-values that are combined."""


def outlier(values: Array) -> Array:
    """How far each class lies above the others, in their standard deviations: ``(classes, …) -> (classes, …)``.

    Each is compared with the mean and the spread of the others, so one extreme class does not hide itself. Bounded to
    ±1e3; 0 where all are equal, or where there are fewer than three classes.
    """
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    if n < 3:
        return np.zeros_like(x)
    # In units in which squares neither overflow nor vanish.
    size = np.abs(x).max(0, keepdims=True)
    x = x / np.where(size > 0, size, 1.0)
    mean = (x.sum(0, keepdims=True) - x) / (n - 1)
    square = ((x - x.mean(0)) ** 2).sum(0, keepdims=True)
    # Sum of squares of the others about their own mean.
    others = square - (x - x.mean(0)) ** 2 * n / (n - 1)
    spread = np.sqrt(np.maximum(others, 0) / (n - 2))
    away = np.divide(x - mean, np.maximum(spread, 1e-9))
    return np.clip(np.where(np.abs(x - mean) < 1e-12, 0.0, away), -1e3, 1e3)


def class_p_values(values: Array) -> Array:
    """One-sided p-value of each class ``(classes, …)``: is it larger than the others, were they a normal sample?"""
    from scipy.stats import t

    n = len(values)
    if n < 3:
        return np.ones_like(np.asarray(values, dtype=np.float64))
    found = t.sf(outlier(values) / math.sqrt(1 + 1 / (n - 1)), n - 2)
    return np.asarray(np.clip(found, SMALLEST, 1.0), dtype=np.float64)


def largest_p_value(p: Array) -> Array:
    """p-value of a network of the smallest over its classes: ``(classes, …) -> (…)``.

    Bonferroni's bound, which is exact where no two classes can stand out at once, as for one outlier (Grubbs).
    """
    return np.asarray(np.clip(len(p) * p.min(0), SMALLEST, 1.0), dtype=np.float64)


def cauchy(p: Array, axis: int = -1) -> Array:
    """One p-value of several that may depend on each other (Liu & Xie 2020).

    Each counts as ``CERTAIN`` at most: bounds of 1 would outweigh any evidence (truncation after Fang et al. 2023).
    """
    x = np.clip(p, SMALLEST, CERTAIN)
    small = x < 1e-8
    with np.errstate(divide="ignore"):
        terms = np.where(small, 1 / (x * np.pi), np.tan((0.5 - x) * np.pi))
    mean = terms.mean(axis)
    found = np.where(mean > 1e8, 1 / (np.maximum(mean, 1e-300) * np.pi), 0.5 - np.arctan(mean) / np.pi)
    return np.asarray(np.clip(found, SMALLEST, 1.0), dtype=np.float64)


TOGETHER = (
    "noise_mean", "noise_share", "noise_std", "margin", "margin_mean", "seen_mean", "universal", "universal_small",
    "universal_wide", "patch", "sparse", "row_sum", "row_positive", "row_apart", "word_rise", "word_gap",
    "word_least", "word_outlier",
)  # fmt: skip
"""Tests whose mean makes the score of a class: a backdoor moves all of them a little."""
CHANGES = ("change_sum", "change_norm", "change_leading")
"""Tests of what changed of a base, whose mean makes another score of a class."""
BEYOND = ("change_share", "channel_isolation", "channel_apart", "channel_lipschitz", "word_outlier")
"""Numbers of the whole network of which the largest is a second score: subnets that stand apart."""
FEWEST = 8
"""Clean networks that a null needs."""
FLOOR = 0.2
"""Added to the spread of a test among clean networks, in standard deviations of the classes of one network."""


def standing(values: Array) -> Array:
    """``outlier``, bounded to ±6: tests ``(classes, tests)`` of one network in units that other networks share.

    Of two classes it is by how much one lies above the other, in units of the larger (times 3).
    """
    if len(values) < 3:
        x = np.asarray(values, dtype=np.float64)
        size = np.abs(x).max(0, keepdims=True)
        x = x / np.where(size > 0, size, 1.0)
        return np.asarray(3 * (x - x.mean(0)), dtype=np.float64)
    return np.clip(outlier(values), -6, 6)


class Described(Protocol):
    """What a null reads of a network: ``weightspace.backdoor.evidence.Evidence`` is that."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def values(self) -> Array: ...
    @property
    def missing(self) -> tuple[str, ...]: ...
    @property
    def whole(self) -> Mapping[str, float]: ...
    @property
    def responses(self) -> Array: ...


@dataclass(frozen=True, eq=False)
class Judged:
    """A network among clean ones: ``p_value`` of all tests together, ``p_values`` of each test.

    ``classes (classes,)``: the score of each class, in spreads of the clean ones; ``target``: most suspicious first.
    """

    p_value: float
    p_values: Mapping[str, float]
    classes: Array
    target: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Null:
    """What clean networks of a family show: ``classes (networks, classes, tests)``, ``whole (networks, numbers)``,
    and the names of both; ``responses (networks, classes, changes)``, without changes where they have none; ``held``:
    what each of them shows among the others, of which ``count`` are independent.

    A class is compared with the same class of the clean networks: an 8 is easier to reach than a 1 for all of them.
    Where classes mean different things in different networks of the family, that comparison loses its edge but stays
    fair.
    """

    names: tuple[str, ...]
    classes: Array
    whole_names: tuple[str, ...]
    whole: Array
    responses: Array
    held: Mapping[str, Array]
    count: int

    def judge(self, found: Described) -> Judged:
        """p-values of a network that is not among the reference.

        Raises ``WeightspaceError`` for another number of classes, or tests that the reference has and the network not.
        """
        if len(found.values) != self.classes.shape[1]:
            raise WeightspaceError(
                f"{len(found.values)} classes; the clean networks have {self.classes.shape[1]}: a null holds for its "
                "own family"
            )
        absent = [n for n in self.names if n not in found.names or n in found.missing]
        absent += [n for n in self.whole_names if n not in found.whole]
        if absent:
            raise WeightspaceError(f"the clean networks were tested for {absent}, this one was not")
        x = standing(found.values[:, [found.names.index(n) for n in self.names]])
        w = _logged(np.array([found.whole[n] for n in self.whole_names]))
        z, zw = _against(self.classes, x), _against(self.whole, w)
        answers = _answers(self.responses, found.responses)
        statistics = _statistics(self.names, z, self.whole_names, zw, answers)
        p = {n: tail(self.held[n], v, self.count) for n, v in statistics.items()}
        tests = [_of_classes(self.names, z, of) for of in (TOGETHER, STAMP_TESTS, CHANGES)]
        scores = np.max([*tests, answers], axis=0)
        return Judged(
            p_value=_joined([p[n] for n in p if n.startswith("=")]),
            p_values={n.lstrip("="): v for n, v in p.items()},
            classes=scores, target=tuple(int(k) for k in np.argsort(-scores, kind="stable")),
        )  # fmt: skip


def null_from(clean: Sequence[Described], groups: Sequence[Hashable] | None = None) -> Null:
    """The null of clean networks of one family: one architecture, one number of classes, best the same data.

    ``groups``: of each network which others it resembles by descent (a parent and its children), so that it is
    not judged by those; without it, all count as independent, and p-values come out too small where they are not.
    Raises ``WeightspaceError`` for fewer than ``FEWEST``, or networks with different numbers of classes.
    """
    if len(clean) < FEWEST:
        raise WeightspaceError(f"{len(clean)} clean networks; at least {FEWEST} of one family were expected for a null")
    sizes = sorted({len(c.values) for c in clean})
    if len(sizes) > 1:
        raise WeightspaceError(f"networks with {sizes} classes; a null is made from one family")
    names = tuple(n for n in clean[0].names if all(n not in c.missing for c in clean))
    whole_names = tuple(n for n in clean[0].whole if all(n in c.whole for c in clean))
    classes = np.array([standing(c.values[:, [c.names.index(n) for n in names]]) for c in clean])
    whole = np.array([_logged(np.array([c.whole[n] for n in whole_names])) for c in clean])
    width = min(c.responses.shape[1] for c in clean)
    responses = np.stack([c.responses[:, :width] if len(c.responses) else np.zeros((sizes[0], 0)) for c in clean])
    own = list(groups) if groups is not None else list(range(len(clean)))
    if len(own) != len(clean) or len(set(own)) < FEWEST:
        raise WeightspaceError(
            f"{len(clean)} clean networks, {len(own)} groups of which {len(set(own))} differ; one for each network, "
            f"at least {FEWEST} different, were expected"
        )
    rows: list[dict[str, float]] = []
    for i, mine in enumerate(own):
        others = [k for k, group in enumerate(own) if group != mine]
        z = _against(classes[others], classes[i])
        zw = _against(whole[others], whole[i])
        rows.append(_statistics(names, z, whole_names, zw, _answers(responses[others], responses[i])))
    held = {n: np.array([r[n] for r in rows]) for n in rows[0]}
    return Null(names, classes, whole_names, whole, responses, held, len(set(own)))


def tail(reference: Array, x: float, count: int = 0) -> float:
    """p-value of ``x`` among few values of clean networks; see ``tails``."""
    return float(tails(reference[:, None], np.array([x]), count)[0])


def tails(reference: Array, x: Array, count: int = 0) -> Array:
    """p-values of ``x (k,)`` among few values of clean networks ``(n, k)``, by Gumbel distributions with their mean and
    spread.

    What is tested is a largest value of many, so its tail is an exponential; that mean and spread are estimates from
    ``count`` independent values (``len(reference)``) is allowed for as in a t-test.
    """
    from scipy.stats import norm, t

    n = count or len(reference)
    spread = np.maximum(reference.std(0, ddof=1), 1e-6 * (1 + np.abs(reference).max(0)))
    away = (x - reference.mean(0)) / (spread * math.sqrt(1 + 1 / n))
    far = np.clip(norm.isf(t.sf(np.abs(away), n - 1)), -37.0, 37.0)
    # Gumbel: mean 0.5772, standard deviation pi / sqrt 6.
    found = -np.expm1(-np.exp(-(np.sign(away) * far * math.pi / math.sqrt(6) + 0.5772)))
    return np.asarray(np.clip(found, SMALLEST, 1.0), dtype=np.float64)


def _logged(whole: Array) -> Array:
    return np.asarray(np.log1p(np.maximum(whole, 0.0)), dtype=np.float64)


def _against(reference: Array, x: Array) -> Array:
    """Each number in units of the spread of the same number among the reference; bounded."""
    return np.asarray(np.clip((x - reference.mean(0)) / (reference.std(0) + FLOOR), -10, 10), dtype=np.float64)


def _of_classes(names: Sequence[str], z: Array, tests: Sequence[str]) -> Array:
    """The score of every class by some of the tests together, ``(classes,)``."""
    chosen = [i for i, n in enumerate(names) if n in tests]
    found: Array = np.clip(z[:, chosen], -3, 6).mean(1) if chosen else np.zeros(len(z))
    return found


def _answers(reference: Array, x: Array) -> Array:
    """The score of every class by how changed pictures are answered, ``(classes,)``; 0 where there is nothing."""
    if not reference.shape[2] or x.shape[1] != reference.shape[2]:
        return np.zeros(reference.shape[1])
    told = beside(reference, x, group_numbers()[0])
    found: Array = np.clip(told[:, : told.shape[1] // 2], -3, 10).mean(1)
    return found


def _statistics(
    names: Sequence[str], z: Array, whole_names: Sequence[str], zw: Array, answers: Array
) -> dict[str, float]:
    """What p-values are made for; those that are joined into one begin with an equals sign."""
    found = {n: float(z[:, i].max()) for i, n in enumerate(names)}
    found |= {n: float(v) for n, v in zip(whole_names, zw, strict=True)}
    found["=classes"] = float(_of_classes(names, z, TOGETHER).max())
    if any(n in STAMP_TESTS for n in names):
        found["=stamps"] = float(_of_classes(names, z, STAMP_TESTS).max())
    if any(n in CHANGES for n in names):
        found["=changes"] = float(_of_classes(names, z, CHANGES).max())
    if answers.any():
        found["=answers"] = float(answers.max())
    beyond = [float(v) for n, v in zip(whole_names, zw, strict=True) if n in BEYOND]
    if beyond:
        found["=channels"] = max(beyond)
    return found


def _joined(p: Sequence[float]) -> float:
    return float(cauchy(np.array(p)))


__all__ = [
    "BEYOND", "CHANGES", "FEWEST", "TOGETHER", "Described", "Judged", "Null", "cauchy", "class_p_values",
    "largest_p_value", "null_from", "outlier", "standing", "tail", "tails",
]  # fmt: skip

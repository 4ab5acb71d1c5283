"""The outcome of a merge as effects of its models and what is left between them, with its posterior.

What model i retains when it is merged with others, on a link scale where losses multiply, is

    t(i | S) = m(i | S) + v_i + Σ_{j ∈ S∖i} d_j + w_iS + u_S,

with m a prior mean (0, or a learned one), v_i how easily a model is hurt, d_j how much it hurts others, w and u what is
particular to this cell and this merge, and further terms whose covariance is a kernel of features of the models or of
the pair. All are Gaussian with a variance per term, so the posterior given measured merges is exact (Rasmussen and
Williams 2006, ch. 2; with one-hot features it is the mixed-effects model of Henderson 1975). Variances maximise the
marginal likelihood of measured merges, with weak log-normal priors.

The number measured for a merge is the mean over its models, so a cell may be observed by itself or within that mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from weightspace.errors import WeightspaceError

Array = NDArray[np.float64]

CEILING = 1.06
"""Retained accuracy that the link takes as infinitely good: merges gain a little over single models at times."""
_FLOOR = 0.01
_JITTER = 1e-6


def link(retained: Array) -> Array:
    """Retained accuracy to the scale on which effects add up: ``-log(CEILING - y)``, so that losses multiply."""
    found: Array = -np.log(np.maximum(CEILING - np.asarray(retained, dtype=np.float64), _FLOOR))
    return found


def unlink(t: Array) -> Array:
    """The inverse of ``link``."""
    found: Array = CEILING - np.exp(-np.asarray(t, dtype=np.float64))
    return found


@dataclass(frozen=True, eq=False)
class Cells:
    """What is predicted: model ``own[c]`` within merge ``sets[c]``; all cells of a merge stand together.

    ``own (n,)`` numbers of models, ``partners (n, models)`` 0 or 1, ``sets (n,)`` numbers of merges.
    """

    own: NDArray[np.int64]
    partners: Array
    sets: NDArray[np.int64]

    @classmethod
    def of(cls, merges: Sequence[Sequence[int]], models: int) -> Cells:
        """A cell for each model of each merge, in that order."""
        own = [i for merge in merges for i in merge]
        sets = [s for s, merge in enumerate(merges) for _ in merge]
        partners = np.zeros((len(own), models))
        for c, (i, s) in enumerate(zip(own, sets, strict=True)):
            partners[c, [j for j in merges[s] if j != i]] = 1.0
        return cls(np.array(own, dtype=np.int64), partners, np.array(sets, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.own)

    def where(self, merge: int) -> NDArray[np.int64]:
        """Numbers of a merge's cells."""
        return np.flatnonzero(self.sets == merge)


@dataclass(frozen=True, eq=False)
class Term:
    """One term: its covariance between cells at variance 1, ``(n, n)``, and the log-normal prior of its variance."""

    name: str
    kernel: Array = field(repr=False)
    centre: float = -2.0
    spread: float = 1.5


def effect_terms(cells: Cells) -> list[Term]:
    """The terms that need no features: a common level, both effects of a model, what is particular."""
    same = (cells.own[:, None] == cells.own[None]).astype(np.float64)
    together = (cells.sets[:, None] == cells.sets[None]).astype(np.float64)
    n = len(cells)
    return [
        Term("level", np.ones((n, n)), 3.0, 1.0),
        Term("vulnerability", same, 0.0),
        Term("damage", cells.partners @ cells.partners.T, -1.0),
        Term("pair", together, -4.0),
        Term("cell", np.eye(n), -3.0),
    ]


def feature_terms(cells: Cells, models: Array | None = None, pairs: Array | None = None) -> list[Term]:
    """Terms from features: ``models (models, d)`` shift both effects and let them act on each other; ``pairs (n, p)``.

    Features ought to have mean 0 and variance 1. Kernels of models are linear, that of pairs Gaussian.
    """
    found = []
    if models is not None:
        near = models @ models.T / models.shape[1]
        own = near[np.ix_(cells.own, cells.own)]
        count = np.maximum(cells.partners.sum(1), 1)[:, None]
        other = (cells.partners / count) @ near @ (cells.partners / count).T
        same = (cells.own[:, None] == cells.own[None]).astype(np.float64)
        alike = cells.partners @ cells.partners.T
        found += [
            Term("vulnerability by features", own, -1.0),
            Term("damage by features", other, -1.0),
            Term("vulnerability × features of the partner", same * other),
            Term("features × features of the partner", own * other),
            Term("damage × features of the model", own * alike),
        ]
    if pairs is not None:
        far = np.square(pairs[:, None] - pairs[None]).sum(-1)
        found.append(Term("features of the pair", np.exp(-0.5 * far / (2.25 * pairs.shape[1]))))
    return found


@dataclass(frozen=True, eq=False)
class Observed:
    """What was measured, on the link scale: ``design (m, n)`` rows that average cells, ``values (m,)``.

    A row of a single cell is one model's retained accuracy; one of several is the mean of a merge, taken on the link
    scale. ``noise (m,)``: variance of the error of each beyond what the term "cell" has.
    """

    design: Array
    values: Array
    noise: Array

    @classmethod
    def cells(cls, which: Sequence[int] | NDArray[np.int64], retained: Array, total: int) -> Observed:
        """Single cells that were measured."""
        design = np.zeros((len(which), total))
        design[np.arange(len(which)), which] = 1.0
        return cls(design, link(retained), np.zeros(len(which)))

    def and_(self, other: Observed) -> Observed:
        """Both."""
        return Observed(*(np.concatenate(pair) for pair in (
            (self.design, other.design), (self.values, other.values), (self.noise, other.noise)
        )))  # fmt: skip


@dataclass(frozen=True, eq=False)
class Posterior:
    """Mean and covariance of cells on the link scale, ``(n,)`` and ``(n, n)``, and the parts of the mean by term."""

    mean: Array
    covariance: Array
    parts: Mapping[str, Array] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The model: terms, their variances, and the prior mean of all cells.

    ``evidence`` is the log marginal likelihood (with the priors) where it was fitted.
    """

    terms: tuple[Term, ...]
    variances: Mapping[str, float]
    prior: Array
    evidence: float = float("nan")

    @property
    def covariance(self) -> Array:
        """The prior covariance of all cells."""
        total = np.zeros_like(self.terms[0].kernel)
        for term in self.terms:
            total += self.variances[term.name] * term.kernel
        return total

    @classmethod
    def start(cls, terms: Sequence[Term], prior: Array | float = 0.0) -> Outcome:
        """Variances at the centres of their priors."""
        n = len(terms[0].kernel)
        return cls(tuple(terms), {t.name: float(np.exp(t.centre)) for t in terms}, np.zeros(n) + prior)

    def fit(self, observed: Observed, steps: int = 60, centred: bool = True) -> Outcome:
        """Variances that maximise the marginal likelihood of what was observed.

        Values are taken in units of their own deviation, so that the priors of variances mean the same everywhere;
        with ``centred`` their mean is added to the prior mean.
        """
        if len(observed.values) < 3:
            raise WeightspaceError(f"{len(observed.values)} measured merges; at least 3 are needed to fit variances")
        left = observed.values - observed.design @ self.prior
        unit = max(float(left.std()), 1e-3)
        centre = float(left.mean()) if centred else 0.0
        z = (left - centre) / unit
        plain = bool((np.count_nonzero(observed.design, axis=1) == 1).all())
        at = observed.design.argmax(1)
        kernels = [
            t.kernel[np.ix_(at, at)] if plain else observed.design @ t.kernel @ observed.design.T for t in self.terms
        ]
        noise = np.diag(observed.noise / unit**2 + _JITTER)
        priors = [(t.centre, t.spread) for t in self.terms]

        def objective(logs: Array) -> tuple[float, Array]:
            sizes = np.exp(logs)
            total = noise.copy()
            for size, kernel in zip(sizes, kernels, strict=True):
                total += size * kernel
            try:
                factor = cho_factor(total, lower=True)
            except np.linalg.LinAlgError:
                return 1e12, np.zeros_like(logs)
            inverse = cho_solve(factor, np.eye(len(z)))
            alpha = inverse @ z
            change = inverse - np.outer(alpha, alpha)
            value = 0.5 * float(z @ alpha) + float(np.log(np.diag(factor[0])).sum())
            slope = np.array([0.5 * s * np.vdot(change, k) for s, k in zip(sizes, kernels, strict=True)])
            for p, (middle, spread) in enumerate(priors):
                value += 0.5 * ((logs[p] - middle) / spread) ** 2
                slope[p] += (logs[p] - middle) / spread**2
            return value, slope

        start = np.array([p[0] for p in priors])
        found = minimize(
            objective, start, jac=True, method="L-BFGS-B", bounds=[(-14.0, 6.0)] * len(start),
            options={"maxiter": steps},
        )  # fmt: skip
        variances = {t.name: float(np.exp(v) * unit**2) for t, v in zip(self.terms, found.x, strict=True)}
        jacobian = len(z) * np.log(unit)
        return replace(self, variances=variances, prior=self.prior + centre, evidence=-float(found.fun) - jacobian)

    def posterior(self, observed: Observed | None = None, parts: bool = False) -> Posterior:
        """What is known of all cells once ``observed`` is; ``parts`` splits the mean by term."""
        prior = self.covariance
        if observed is None or not len(observed.values):
            return Posterior(self.prior.copy(), prior)
        across = observed.design @ prior
        total = across @ observed.design.T + np.diag(observed.noise + _JITTER)
        factor = cho_factor(total, lower=True)
        alpha = cho_solve(factor, observed.values - observed.design @ self.prior)
        mean = self.prior + across.T @ alpha
        covariance = prior - across.T @ cho_solve(factor, across)
        split = {}
        if parts:
            back = observed.design.T @ alpha
            split = {t.name: self.variances[t.name] * (t.kernel @ back) for t in self.terms}
        return Posterior(mean, covariance, split)


def retained(posterior: Posterior, cells: Sequence[int] | NDArray[np.int64]) -> float:
    """The predicted outcome of one merge with these cells: the mean over them of the median retained accuracy."""
    return float(unlink(posterior.mean[np.asarray(cells)]).mean())


def expected(posterior: Posterior, cells: Sequence[int] | NDArray[np.int64]) -> Array:
    """The mean retained accuracy of cells under the posterior, ``(len(cells),)``; ``retained`` takes medians.

    Losses are log-normal where ``CEILING`` is far, so theirs is exp(−m + s²/2).
    """
    at = np.asarray(cells)
    found: Array = CEILING - np.exp(-posterior.mean[at] + np.diag(posterior.covariance)[at] / 2)
    return found


def outcome_interval(
    posterior: Posterior, cells: Sequence[int] | NDArray[np.int64], coverage: float = 0.9, widen: float = 1.0
) -> tuple[float, float]:
    """An interval that holds the outcome of one merge with probability ``coverage`` under the posterior.

    ``widen`` multiplies deviations on the link scale (a conformal factor).
    """
    at = np.asarray(cells)
    values = draws(posterior, at, widen)
    low, high = np.quantile(values, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)


def draws(posterior: Posterior, at: NDArray[np.int64], widen: float = 1.0, count: int = 1024) -> Array:
    """Outcomes of one merge under the posterior, the same ones every time: ``(count,)``."""
    rng = np.random.default_rng(0)
    covariance = posterior.covariance[np.ix_(at, at)]
    root = np.linalg.cholesky(covariance + _JITTER * np.eye(len(at)))
    half = rng.standard_normal((count // 2, len(at)))
    noise = np.concatenate((half, -half)) @ root.T
    found: Array = unlink(posterior.mean[at] + widen * noise).mean(1)
    return found


def most_informative(
    model: Outcome, observed: Observed | None, merges: Mapping[int, NDArray[np.int64]], targets: NDArray[np.int64]
) -> tuple[int, float]:
    """The merge whose measurement lowers the summed posterior variance of the ``targets`` cells most.

    ``merges``: candidates and their cells. Gives its number and the share of that variance it removes; the gain does
    not depend on what the measurement will say.
    """
    if not merges:
        raise WeightspaceError("there is no merge left to measure")
    covariance = model.posterior(observed).covariance
    total = float(np.trace(covariance[np.ix_(targets, targets)]))
    best, most = -1, -1.0
    for merge, cells in merges.items():
        within = covariance[np.ix_(cells, cells)] + _JITTER * np.eye(len(cells))
        across = covariance[np.ix_(cells, targets)]
        gain = float(np.vdot(across, np.linalg.solve(within, across)))
        if gain > most:
            best, most = merge, gain
    return best, most / max(total, 1e-12)

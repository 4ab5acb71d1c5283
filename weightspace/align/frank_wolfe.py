"""Frank-Wolfe over all factors at once, after C²M³ (Crisostomi et al. 2024).

Permutations are relaxed to doubly stochastic matrices, one for every position that a factor is fibred over. The inner
product of the two networks is then a polynomial in them, linear in each; a step goes from where all of them are
towards the permutations that its gradient likes best (a linear assignment each), as far as the polynomial rises. Moving
all factors together sees what coordinate ascent, where each answers to the others' present whims, does not.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from weightspace.align.alignment import Found
from weightspace.wiring.matching import Matching, assign, dot, float32, tensor_weights, unit_of
from weightspace.wiring.places import Place, places
from weightspace.wiring.wiring import Permutation, Wiring, _act


def frank_wolfe(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, *, seed: int = 0, steps: int = 60,
    tolerance: float = 1e-5, start: str = "centre", weighting: str = "plain",
) -> Found:  # fmt: skip
    """The group element that Frank-Wolfe ends at, made whole by assignments and polished by coordinate ascent.

    ``steps``: at most so many. ``tolerance``: stops when the gap, which bounds what a linear step can gain, is below
    this share of ``|a| |b|``. ``start``: ``centre`` (every matrix uniform), ``identity``, ``anchored`` (the first match
    outward from what cannot move), ``random`` (drawn by ``seed``).
    """
    fixed, moving = float32(a), float32(b)
    weights = tensor_weights(wiring, fixed, moving, weighting)
    relaxed = Relaxed(wiring, fixed, moving, weights)
    relaxed.begin(start, seed)
    history = relaxed.climb(steps, tolerance)
    whole = relaxed.rounded()
    found = Matching(wiring, fixed, moving, weights, start=whole)
    at = found.objective / found.unit
    sweeps = found.ascend(torch.Generator().manual_seed(seed))
    found.recount()
    return Found(
        found.permutation,
        {f: found.similarity(f) for f in found.factors},
        {"steps": len(history) - 1, "relaxed": history[-1], "rounded": at, "sweeps": sweeps},
    )


class Relaxed:
    """Doubly stochastic matrices ``(*over, n, n)`` per factor, and the inner product as their polynomial."""

    def __init__(
        self, wiring: Wiring, fixed: Mapping[str, Tensor], moving: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> None:
        self.wiring, self.fixed, self.moving, self.weights = wiring, fixed, moving, dict(weights)
        found = places(wiring)
        self.rows: dict[str, list[Place]] = {t: [] for t in self.weights}
        self.factors: dict[str, tuple[Place, ...]] = {}
        for name, factor in wiring.free.items():
            row = tuple(p for p in found[name] if self.weights.get(p.tensor))
            if factor.size > 1 and row:
                self.factors[name] = row
        # What others are fibred over acts first.
        order = sorted(self.factors, key=lambda n: len(wiring.factors[n].over))
        for name in order:
            for p in self.factors[name]:
                self.rows[p.tensor].append(p)
        self.degree = max((len(r) for r in self.rows.values()), default=0)
        self.unit = unit_of(fixed, moving, self.weights)
        self.matrices: dict[str, Tensor] = {}

    def begin(self, start: str, seed: int = 0) -> None:
        """Sets the matrices to a start by name."""
        if start in ("identity", "anchored", "random"):
            perm = self.wiring.identity()
            if start == "anchored":
                first = Matching(self.wiring, self.fixed, self.moving, self.weights)
                first.anchored()
                perm = first.permutation
            elif start == "random":
                perm = self.wiring.random(seed)
            self.matrices = {f: _matrix(perm._of(f)) for f in self.factors}
            return
        for f in self.factors:
            factor = self.wiring.factors[f]
            shape = [self.wiring.factors[o].size for o in factor.over]
            self.matrices[f] = torch.full((*shape, factor.size, factor.size), 1 / factor.size)

    def moved(self, tensor: str, matrices: Mapping[str, Tensor]) -> Tensor:
        """The moving tensor after the matrices of all its places acted."""
        out = self.moving[tensor]
        for p in self.rows[tensor]:
            out = p.put(out, matrices[p.factor] @ p.view(out))
        return out

    def value(self, matrices: Mapping[str, Tensor]) -> float:
        """The inner product at the given matrices."""
        return sum(w * dot(self.fixed[t], self.moved(t, matrices)) for t, w in self.weights.items())

    def gradient(self) -> tuple[dict[str, Tensor], float]:
        """The derivative by every factor's matrices, and the value, at the present ones."""
        total = {f: torch.zeros_like(m) for f, m in self.matrices.items()}
        value = 0.0
        for t, w in self.weights.items():
            names = list(dict.fromkeys(p.factor for p in self.rows[t]))
            leaves = {f: self.matrices[f].clone().requires_grad_() for f in names}
            with torch.enable_grad():
                moved = self.moved(t, leaves)
                found = torch.autograd.grad(moved, list(leaves.values()), grad_outputs=w * self.fixed[t])
            value += w * dot(self.fixed[t], moved.detach())
            for f, g in zip(names, found, strict=True):
                total[f] += g
        return total, value

    def climb(self, steps: int, tolerance: float) -> list[float]:
        """Frank-Wolfe steps until the gap is small; gives the values on the way, relative to ``|a| |b|``."""
        history = []
        for _ in range(steps):
            gradient, value = self.gradient()
            history.append(value / self.unit)
            vertex = {f: assign(g) for f, g in gradient.items()}
            whole = {f: _matrix(p) for f, p in vertex.items()}
            slope = sum(float((g * (whole[f] - self.matrices[f])).double().sum()) for f, g in gradient.items())
            if slope <= tolerance * self.unit:
                break
            size = self._length(value, slope, Permutation(vertex, self.wiring.factors), whole)
            if size <= 1e-6:
                break
            self.matrices = {f: torch.lerp(m, whole[f], size) for f, m in self.matrices.items()}
        return history

    def _length(self, value: float, slope: float, vertex: Permutation, whole: Mapping[str, Tensor]) -> float:
        """How far to go: the maximum on [0, 1] of the polynomial along the way, known from as many values."""
        end = sum(
            w * dot(self.fixed[t], _act(self.moving[t], self.wiring.layouts[t], vertex))
            for t, w in self.weights.items()
        )
        at, values = [1.0], [end]
        for k in range(1, self.degree - 1):
            x = k / (self.degree - 1)
            between = {f: torch.lerp(m, whole[f], x) for f, m in self.matrices.items()}
            at.append(x)
            values.append(self.value(between))
        if self.degree < 2:
            return 1.0
        # value + slope x + x^2 q(x): q goes through what is left of the values.
        rest = [(v - value - slope * x) / x**2 for x, v in zip(at, values, strict=True)]
        q = np.polynomial.Polynomial.fit(at, rest, len(at) - 1).convert()
        f = np.polynomial.Polynomial([value, slope]) + np.polynomial.Polynomial([0, 0, 1]) * q
        roots = [float(r.real) for r in np.atleast_1d(f.deriv().roots()) if abs(r.imag) < 1e-9 and 0 < r.real < 1]
        return max([*roots, 1.0], key=lambda x: float(f(x)))

    def rounded(self) -> Permutation:
        """The permutations nearest to the matrices."""
        return Permutation({f: assign(m) for f, m in self.matrices.items()}, self.wiring.factors)


def _matrix(index: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(index, index.shape[-1]).to(torch.float32)

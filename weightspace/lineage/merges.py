"""Networks that are sums of relatives: which, and in what proportions.

A linear merge, a task vector added (Ilharco et al. 2023, "Editing models with task arithmetic") or an interpolation is
an affine combination of its parents, ``m = sum_i w_i x_i`` with ``sum_i w_i = 1``, up to rounding; training never ends
in one. It is found by orthogonal matching pursuit (Pati et al. 1993) on the family's inner products. In such a relation
each member is a combination of the others; the merge is the one that lies between them, or else the one for which
nothing but the base, the network nearest to the origin, has a negative weight.

TIES, DARE and their like choose at each weight which of the parents count (Yadav et al. 2023, "TIES-merging"; Yu et al.
2024, "Language models are super Mario"): ``m - base`` is at each weight zero, or one parent's difference times a
constant, or a sum or mean of several's. Candidates are found by least squares without negative weights, and what shows
them is the share of weights where that holds exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from weightspace.lineage.geometry import Geometry
from weightspace.lineage.sample import Array, Floats

EXACT = 1e-4
"""Squared distance to a combination, over that to the nearest relative, below which it is one."""
EXPLAINED = 0.9
"""Share of weights that a choice among parents has to explain."""
_ATOMS = 10
_CONSIDERED = 48
_LEAST = 5e-3
_PARENTS = 4
_MOST_PARENTS = 5
_SEARCHED = 14
_LOOKED = 1 << 14
_SPARE = 0.02


@dataclass(frozen=True)
class Mixture:
    """A merge: ``shares`` of its parents (positive, sum 1), and ``weights`` as found, those of the base included.

    ``how``: "linear" (weights from 0 to 1), "task arithmetic" (with a base) or "chosen" (TIES, DARE and their like).
    ``residual``: squared distance to the combination over that to the nearest relative; of chosen ones the share of the
    changed weights that is not explained.
    """

    merged: int
    base: int | None
    weights: Mapping[int, float]
    shares: Mapping[int, float]
    how: str
    residual: float


def combinations_in(
    geometry: Geometry, left_out: Collection[int] = (), above: Mapping[int, Collection[int]] | None = None
) -> list[Mixture]:
    """Exact affine combinations of a family, each network at most once as the merged one; copies are left out.

    ``above``: what each network seems to descend from, merges not yet known; it tells a base from a parent.

    Several merges of the same networks depend on each other in many ways. The shortest relations are told first, as
    many as the dimension of what the networks span falls short of their number.
    """
    usable = [i for i in range(geometry.count) if i not in left_out]
    if len(usable) < 3:
        return []
    involved: dict[int, set[int]] = {}
    for m in usable:
        relation = _pursue(geometry, m, [i for i in usable if i != m])
        if relation is not None:
            members = {m, *relation[0]}
            for other in [i for i in members if i in involved]:
                members |= involved[other]
            involved |= dict.fromkeys(members, members)
    kept: list[Mixture] = []
    for group in {id(g): sorted(g) for g in involved.values()}.values():
        kept.extend(_shortest(geometry, group, above or {}))
    return kept


def _shortest(geometry: Geometry, group: Sequence[int], origins: Mapping[int, Collection[int]]) -> list[Mixture]:
    """The shortest relations of networks that depend on each other, and which of them each makes a merge."""
    found: list[Mixture] = []
    above: dict[int, set[int]] = {}
    missing = len(group) - 1 - _dimension(geometry, group)
    for size in range(2, _MOST_PARENTS + 1):
        now = []
        for m in group:
            near = [int(i) for i in geometry.near[m] if int(i) in group][:_SEARCHED]
            for subset in combinations(near, size):
                exact = _exact(geometry, m, subset)
                mixture = None if exact is None else _read(geometry, m, *exact, origins)
                if mixture is not None:
                    now.append(mixture)
        # Of several that are as short, those between their parents are the surest.
        for mixture in sorted(now, key=lambda x: (min(x.weights.values()) < 0, x.how != "linear", x.residual)):
            ancestors = set(mixture.weights) | {a for w in mixture.weights for a in above.get(w, ())}
            if len(found) < missing and mixture.merged not in above and mixture.merged not in ancestors:
                above[mixture.merged] = ancestors
                found.append(mixture)
        if len(found) >= missing:
            break
    return found


def _dimension(geometry: Geometry, group: Sequence[int]) -> int:
    """Dimension of the affine space that networks span, up to rounding."""
    g = geometry.gram[np.ix_(group, group)]
    g = g - g.mean(0) - g.mean(1)[:, None] + g.mean()
    apart = float(np.median([geometry.squared[geometry.near[i][0], i] for i in group]))
    return int((np.linalg.eigvalsh(g) > EXACT * max(apart, geometry.tiny) / len(group)).sum())


def _exact(geometry: Geometry, m: int, names: Sequence[int]) -> tuple[dict[int, float], float] | None:
    """Weights of an affine combination of some networks that is ``m``, all of them needed; None if there is none."""
    scale = max(float(geometry.squared[geometry.near[m][0], m]), geometry.tiny)
    a = geometry.gram[np.ix_(names, names)]
    shift = float(np.trace(a)) / len(names) + geometry.tiny
    target = geometry.gram[list(names), m]
    weights = np.asarray(np.linalg.lstsq(a + shift, target + shift, rcond=1e-14)[0], dtype=np.float64)
    rest = float(geometry.gram[m, m] - 2 * weights @ target + weights @ a @ weights) / scale
    if rest > EXACT or abs(weights.sum() - 1) > 1e-2 or float(np.abs(weights).min()) < _LEAST:
        return None
    return {i: float(w) for i, w in zip(names, weights, strict=True)}, max(rest, 0.0)


def _pursue(geometry: Geometry, m: int, others: Sequence[int]) -> tuple[dict[int, float], float] | None:
    """Few others whose affine combination is ``m``, with their weights, or None."""
    allowed = set(others)
    near = [i for i in map(int, geometry.near[m]) if i in allowed][:_CONSIDERED]
    if len(near) < 2:
        return None
    scale = max(float(geometry.squared[near[0], m]), geometry.tiny)
    if scale <= geometry.tiny:
        return None
    first = near[0]
    # Differences to the nearest relative: g their inner products, t those with what is to be explained.
    g = geometry.gram[np.ix_(near, near)] - geometry.gram[near][:, [first]] - geometry.gram[[first]][:, near]
    g = g + geometry.gram[first, first]
    t = geometry.gram[near, m] - geometry.gram[first, m] - geometry.gram[near, first] + geometry.gram[first, first]
    chosen: list[int] = []
    weights: Array = np.zeros(0)
    own = np.maximum(np.diag(g), geometry.tiny)
    for _ in range(min(_ATOMS, len(near) - 1)):
        left = t - (g[:, chosen] @ weights if chosen else 0.0)
        gain = left**2 / own
        gain[[0, *chosen]] = -1
        chosen.append(int(gain.argmax()))
        weights = _solve(g, t, chosen)
        residual = scale - float(weights @ t[chosen])
        if residual <= EXACT * scale:
            break
    else:
        return None
    # Whoever has no weight was a detour.
    full = {near[c]: float(w) for c, w in zip(chosen, weights, strict=True)}
    full[first] = 1 - sum(full.values())
    kept = {i: w for i, w in full.items() if abs(w) >= _LEAST}
    return _exact(geometry, m, list(kept)) if len(kept) > 1 else None


def _solve(g: Array, t: Array, chosen: Sequence[int]) -> Array:
    return np.asarray(np.linalg.lstsq(g[np.ix_(chosen, chosen)], t[chosen], rcond=1e-14)[0])


def _read(
    geometry: Geometry, m: int, weights: Mapping[int, float], residual: float, above: Mapping[int, Collection[int]]
) -> Mixture | None:
    """Which kind of merge a relation makes of ``m``; None where another of its members is the merge."""
    base = min([m, *weights], key=lambda i: geometry.sign * geometry.norms[i])
    if min(weights.values()) > 0:
        parents = dict(weights)
        if len(weights) > 2 and base != m and all(base in above.get(i, ()) for i in weights if i != base):
            shares = _normal({i: w for i, w in weights.items() if i != base})
            return Mixture(m, base, weights, shares, "task arithmetic", residual)
        return Mixture(m, None, weights, _normal(parents), "linear", residual)
    negative = [i for i, w in weights.items() if w < 0]
    if base != m and negative == [base]:
        parents = {i: w for i, w in weights.items() if i != base}
        return Mixture(m, base, weights, _normal(parents), "task arithmetic", residual)
    return None


def _normal(weights: Mapping[int, float]) -> dict[int, float]:
    total = sum(weights.values())
    return {i: w / total for i, w in weights.items()}


def chosen_sums(
    geometry: Geometry, values: Floats, m: int, base: int, others: Sequence[int], epsilon: float = 6e-8
) -> Mixture | None:
    """Whether ``m`` takes at each weight the sum or mean of some of the others' differences to ``base``, or none's.

    ``epsilon``: relative rounding of the values. None where less than ``EXPLAINED`` of the weights is explained, or
    where as much would be by chance.
    """
    candidates = _without_negative(geometry, m, base, others)
    if len(candidates) < 2:
        return None
    rng = np.random.default_rng(0)
    width = values.shape[1]
    at = np.arange(width) if width <= _LOOKED else rng.choice(width, _LOOKED, replace=False)
    start = values[base, at].astype(np.float64)
    changed = values[m, at].astype(np.float64) - start
    steps = {i: values[i, at].astype(np.float64) - start for i in candidates}
    blur = 8 * epsilon * (np.abs(start) + np.abs(changed) + sum(np.abs(s) for s in steps.values())) + 1e-12
    share, scales = _explained(changed, steps, blur)
    if share < EXPLAINED or len(scales) < 2:
        return None
    # As few parents as explain it: a descendant of a parent has much in common with it.
    for few in (c for size in range(2, len(scales)) for c in combinations(scales, size)):
        told, theirs = _explained(changed, {i: steps[i] for i in few}, blur)
        if told >= share - _SPARE and len(theirs) == len(few):
            share, scales = told, theirs
            break
    used, steps = scales, {i: steps[i] for i in scales}
    order = rng.permutation(len(at))
    chance, _ = _explained(changed, {i: s[order] for i, s in steps.items()}, blur)
    if chance > 0.5 + 0.5 * float((np.abs(changed) <= blur).mean()):
        return None
    return Mixture(m, base, used, _normal(used), "chosen", 1 - share)


def _without_negative(geometry: Geometry, m: int, base: int, others: Sequence[int]) -> list[int]:
    from scipy.optimize import nnls

    names = [i for i in others if i not in (m, base)]
    if len(names) < 2:
        return []
    g = geometry.gram
    at = np.ix_(names, names)
    products = g[at] - g[names][:, [base]] - g[[base]][:, names] + g[base, base]
    target = g[names, m] - g[base, m] - g[names, base] + g[base, base]
    values, vectors = np.linalg.eigh(products)
    values = np.maximum(values, 1e-10 * max(float(values[-1]), geometry.tiny))
    root = vectors * np.sqrt(values)
    weights, _ = nnls(root.T, (vectors / np.sqrt(values)).T @ target, maxiter=20 * len(names))
    strength = weights * np.sqrt(np.maximum(np.diag(products), 0))
    order = np.argsort(-strength)[:_PARENTS]
    return [names[int(i)] for i in order if strength[i] > 0.05 * strength.max()]


def _explained(changed: Array, steps: Mapping[int, Array], blur: Array) -> tuple[float, dict[int, float]]:
    """Share of changed weights that are a chosen sum or mean, and the factor of each parent's own."""
    moved = np.abs(changed) > blur
    if moved.sum() < 64:
        return 0.0, {}
    scales: dict[int, float] = {}
    for i, own in steps.items():
        told = moved & (np.abs(own) > 64 * blur)
        ratio = changed[told] / own[told]
        ratio = ratio[(ratio > 0.01) & (ratio < 100)]
        if len(ratio) < 32:
            continue
        logs = np.log(ratio)
        counts, edges = np.histogram(logs, bins=4000, range=(-4.7, 4.7))
        top = int(counts.argmax())
        inside = (logs >= edges[max(top - 1, 0)]) & (logs <= edges[min(top + 2, len(edges) - 1)])
        if counts[top] >= max(16, 0.02 * len(ratio)):
            scales[i] = float(np.exp(np.median(logs[inside])))
    told = ~moved
    names = list(scales)
    for size in range(1, len(names) + 1):
        for subset in combinations(names, size):
            total = sum(scales[i] * steps[i] for i in subset)
            loose = blur * (1 + max(scales[i] for i in subset)) + 1e-4 * np.abs(changed)
            told |= np.abs(changed - total) <= loose
            if size > 1:
                told |= np.abs(changed - total / size) <= loose
    return float(told[moved].mean()), scales


__all__ = ["EXACT", "EXPLAINED", "Mixture", "chosen_sums", "combinations_in"]

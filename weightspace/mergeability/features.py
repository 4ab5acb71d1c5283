"""What weights say of models before they are merged: of each by itself, and of every pair, block by block.

With task vectors τ = model − base, for every weight matrix of a network, seen as (out, in · positions):

- of a model: ‖τ‖/‖base‖, the effective rank exp(H(σ²/Σσ²)) and stable rank Σσ²/σ₁² of τ and its spectral gap
  1 − σ₂/σ₁; how evenly rows and columns change (entropy of their shares), the cosine of τ and base, the same by row,
  and how much larger the base is on rows that change;
- of a pair: cosine (over the whole network this is the task-vector correlation of Model Kinship, Hu et al. 2024), share
  of conflicting signs among what is large in both (Yadav et al. 2023), overlap of the left and of the right singular
  subspaces, singular-vector interference ‖(UᵀU − 1) Σ (VᵀV − 1)‖₁ (Gargiulo et al. 2025), overlap of the energy by
  rows and by columns, distance, and how far its axes are from a better matching (the gain of one assignment per axis
  over leaving it as it is; Ainsworth et al. 2023), where a wiring is given;
- of a pair, seen from the first: ⟨τ_A, τ_B⟩/‖τ_A‖² (what B adds along A's change), the energy of τ_B within the leading
  singular subspaces of τ_A, that on the rows that A changes, and the cosine on those rows.

Every number is kept by block for explanation; a network of any depth becomes a vector of fixed length by ``vector``.
All are inner products, spectra or sums over whole axes, so a permutation of the axes of base, A and B together changes
nothing, and the order of models does not count. Names, dtypes, counters and the order of tensors in a file do not
count: only floating-point tensors with more than one element do, blocks stand in the order in which the network uses
them (by their share of the change where no wiring says), and everything is computed in float32 or float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightspace.errors import WeightspaceError

if TYPE_CHECKING:
    from weightspace.wiring.wiring import Wiring

Array = NDArray[np.float64]

MODEL_TERMS = (
    "size", "effective rank", "stable rank", "spectral gap", "rows changed", "columns changed", "base cosine",
    "base cosine by row", "base on changed rows",
)  # fmt: skip
"""Of a model, for each block."""
PAIR_TERMS = (
    "cosine", "sign conflict", "left subspace", "right subspace", "singular interference", "row overlap",
    "column overlap", "distance", "misalignment", "projection", "disturbance", "disturbance of rows", "row cosine",
)  # fmt: skip
"""Of a pair, for each block; those from "projection" on as the first of the two sees it, the others symmetric."""
SUMMARIES = ("mean", "largest", "smallest", "first", "inner", "last")
"""What becomes of the blocks of a network in a vector of fixed length; ``mean`` weighs them by their change."""

_RANK = 8
_LARGE = 0.2
"""Share of a task vector's elements, by magnitude, that count as large where signs are compared."""
_SPECTRA = 2048
"""Matrices with more rows and columns than this are seen through a projection of so many directions."""
_MATCHED = 2048


@dataclass(frozen=True, eq=False)
class Comparison:
    """Features of ``n`` models on one wiring, against one base.

    ``blocks``: names of tensors, for explanation alone; ``own (n, blocks, MODEL_TERMS)``; ``pairs (n, n, blocks,
    PAIR_TERMS)``; ``changes (n, blocks)``: squared norms of task vectors; ``whole (n, n)``:
    cosines of task vectors as a whole; ``scale (n,)``: log ‖τ‖/‖base‖ of the whole. ``base`` says whether there was
    one: without it τ is the whole model.
    """

    models: tuple[str, ...]
    blocks: tuple[str, ...]
    own: Array = field(repr=False)
    pairs: Array = field(repr=False)
    changes: Array = field(repr=False)
    whole: Array = field(repr=False)
    scale: Array = field(repr=False)
    parameters: int = 0
    base: bool = True

    @cached_property
    def _summaries(self) -> tuple[Array, Array]:
        """Of models ``(n, own)`` and of pairs ``(n, n, pair)``: their blocks in a fixed length."""
        shares = self.changes / np.maximum(self.changes.sum(1, keepdims=True), 1e-30)
        return _summary(self.own, shares), _summary(self.pairs, (shares[:, None] + shares[None]) / 2)

    def vector(self, i: int, partners: Sequence[int]) -> Array:
        """What is known of model ``i`` in a merge with ``partners``, ``(len(NAMES),)``; order of partners is free."""
        own, pairs = self._summaries
        others = list(partners)
        among = [self.whole[j, k] for n, j in enumerate(others) for k in others[n + 1 :]]
        whole = np.array(
            [
                self.scale[i],
                np.log(np.mean(np.exp(self.scale[others])) + 1e-12),
                np.log(np.exp(2 * self.scale[others]).sum() + 1e-24) / 2 - self.scale[i],
                self.whole[i, others].mean(),
                self.whole[i, others].max(),
                float(np.mean(among)) if among else 0.0,
                float(len(others)),
                np.log(max(self.parameters, 1)),
                float(len(self.blocks)),
            ]
        )
        between = pairs[i, others]
        return np.concatenate((whole, own[i], own[others].mean(0), between.mean(0), between.max(0)))

    def vectors(self, merges: Sequence[Sequence[int]]) -> Array:
        """A row for each model of each merge, in that order: ``(cells, len(NAMES))``."""
        rows = [self.vector(i, [j for j in merge if j != i]) for merge in merges for i in merge]
        return np.array(rows).reshape(-1, len(NAMES))

    def flat(self) -> dict[str, Array]:
        """Published one-number scores of pairs, ``(n, n)`` each: the baselines."""
        lengths = np.sqrt(self.changes.sum(1))
        square = lengths[:, None] ** 2 + lengths[None] ** 2 - 2 * self.whole * lengths[:, None] * lengths[None]
        weights = self.changes[:, None] + self.changes[None]
        weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)

        def mean(term: str) -> Array:
            found: Array = (self.pairs[..., PAIR_TERMS.index(term)] * weights).sum(-1)
            return found

        return {
            "cosine": np.cos(np.arccos(np.clip(self.whole, -1, 1))),
            "L2 distance": -np.sqrt(np.maximum(square, 0)),
            "sign conflict": -mean("sign conflict"),
            "singular interference": -mean("singular interference"),
            "subspace overlap": -mean("left subspace"),
        }

    def __repr__(self) -> str:
        origin = "a base" if self.base else "no base"
        return f"Comparison({len(self.models)} models, {origin}, {len(self.blocks)} blocks)"


_WHOLE = (
    "size of the change", "size of the partners' change", "ratio of sizes", "kinship", "largest kinship",
    "kinship among partners", "partners", "parameters", "blocks",
)  # fmt: skip
NAMES = (
    *_WHOLE,
    *(f"own {t}, {s}" for t in MODEL_TERMS for s in SUMMARIES),
    *(f"partner's {t}, {s}" for t in MODEL_TERMS for s in SUMMARIES),
    *(f"{t}, {s}" for t in PAIR_TERMS for s in SUMMARIES),
    *(f"{t} of the nearest, {s}" for t in PAIR_TERMS for s in SUMMARIES),
)
"""What the numbers of ``Comparison.vector`` are."""


def term_of(name: str) -> str:
    """The term that a number of a vector belongs to, for explanation: ``"sign conflict"``, ``"norm ratio"`` …"""
    if name in _WHOLE:
        return {"kinship": "cosine", "largest kinship": "cosine", "kinship among partners": "cosine"}.get(
            name, "norm ratio" if "size" in name else "shape"
        )
    stem = name.split(", ")[0].removeprefix("own ").removeprefix("partner's ").removesuffix(" of the nearest")
    return {"size": "norm ratio", "left subspace": "subspace overlap", "right subspace": "subspace overlap"}.get(
        stem, stem
    )


def compare(
    models: Mapping[str, Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    wiring: Wiring | None = None,
    *,
    matching: bool | None = None,
) -> Comparison:
    """Features of models, read tensor by tensor: one tensor of all models is in memory at a time.

    ``models`` and ``base``: lazy mappings of tensors of the same names and shapes. ``wiring`` gives the order of blocks
    and the axes that may be misaligned; ``matching`` says whether to look for that (default: with a wiring and without
    a base, or for networks of less than a million parameters). Raises ``WeightspaceError`` for models that do not fit.
    """
    if not models:
        raise WeightspaceError("there are no models to compare")
    labels = tuple(models)
    first = models[labels[0]] if base is None else base
    shapes = {name: tuple(first[name].shape) for name in _ordered(first, wiring)}
    names = [name for name, shape in shapes.items() if prod(shape) > 1]
    parameters = sum(prod(shapes[n]) for n in names)
    if matching is None:
        matching = wiring is not None and (base is None or parameters < 1_000_000)
    n = len(labels)
    lengths, products, origin = np.zeros(n), np.zeros((n, n)), 0.0
    rows: list[tuple[str, Array, Array, Array]] = []
    axes = _Axes(wiring, n) if wiring is not None and matching else None
    for name in names:
        start = None if base is None else base[name].detach().to(torch.float32)
        stack = []
        for label in labels:
            tensor = models[label].get(name)
            if tensor is None or tuple(tensor.shape) != shapes[name]:
                what = "is missing" if tensor is None else f"has the shape {tuple(tensor.shape)}"
                raise WeightspaceError(f"tensor {name!r} {what} in {label}, {shapes[name]} was expected")
            stack.append(tensor.detach().to(torch.float32))
        values = torch.stack(stack)
        if axes is not None:
            axes.read(name, values)
        delta = values if start is None else values - start
        gram = _gram(delta)
        lengths += np.diag(gram)
        products += gram
        size = float(np.diag(gram).mean() if start is None else start.double().square().sum())
        origin += size
        if delta.dim() > 2 and delta.shape[1] > 1:
            rows.append((name, *_block(delta, gram, size, start)))
    if not rows:
        raise WeightspaceError("the models have no weight matrix to compare")
    if wiring is None or not wiring.roles:
        rows.sort(key=lambda row: -float(np.diag(row[3]).sum()))
    root = np.sqrt(np.maximum(lengths, 1e-30))
    pairs = np.stack([row[2] for row in rows], axis=2)
    if axes is not None:
        pairs[..., PAIR_TERMS.index("misalignment")] = axes.of([row[0] for row in rows])
    return Comparison(
        labels, tuple(row[0] for row in rows), np.stack([row[1] for row in rows], axis=1), pairs,
        np.stack([np.diag(row[3]) for row in rows], axis=1), products / root[:, None] / root[None],
        np.log(root / max(origin, 1e-30) ** 0.5 + 1e-8), parameters, base is not None,
    )  # fmt: skip


# -------------------------------------------------------------------- one block


def _block(delta: Tensor, gram: Array, size: float, base: Tensor | None) -> tuple[Array, Array, Array]:
    """Terms of models ``(n, own)`` and pairs ``(n, n, pair)``, inner products ``(n, n)``: of one tensor's changes."""
    n = len(delta)
    matrices = delta.flatten(2)
    u, s, v = _spectra(matrices)
    energy = s.square()
    total = energy.sum(1, keepdim=True).clamp_min(1e-30)
    shares = energy / total
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum(1)
    own = torch.stack(
        (
            (total[:, 0] / max(size, 1e-30)).clamp_min(1e-16).log() / 2,
            entropy,
            (1 / shares[:, 0].clamp_min(1e-12)).log(),
            1 - s[:, 1] / s[:, 0].clamp_min(1e-20) if s.shape[1] > 1 else torch.ones(n),
            *_rows_and_base(matrices, base),
        ),
        dim=1,
    )
    k = min(_RANK, s.shape[1])
    left, right, top = u[:, :, :k], v[:, :, :k], s[:, :k]
    across_left = torch.einsum("imk,jml->ijkl", left, left)
    across_right = torch.einsum("imk,jml->ijkl", right, right)
    clash = torch.einsum("ijkl,jl,ijml->ijkm", across_left, top, across_right).abs().sum((2, 3))
    sums = top.sum(1)
    clash = (clash + clash.T) / (sums[:, None] + sums[None]).clamp_min(1e-20)
    root = np.sqrt(np.maximum(np.diag(gram), 1e-30))
    cosine = gram / root[:, None] / root[None]
    apart = np.log(np.maximum(root[:, None] ** 2 + root[None] ** 2 - 2 * gram, 1e-30) / max(size, 1e-30) + 1e-16) / 2
    found = np.stack(
        (
            cosine,
            _conflict(delta),
            (across_left.square().sum((2, 3)) / k).double().numpy(),
            (across_right.square().sum((2, 3)) / k).double().numpy(),
            clash.double().numpy(),
            _profiles(matrices.square().sum(2)),
            _profiles(matrices.square().sum(1)),
            apart,
            np.zeros((n, n)),
        ),
        axis=2,
    )
    found = (found + found.transpose(1, 0, 2)) / 2
    return own.double().numpy(), np.concatenate((found, _seen(matrices, left, right, gram)), axis=2), gram


def _rows_and_base(matrices: Tensor, base: Tensor | None) -> tuple[Tensor, ...]:
    """Of changes ``(n, out, in)``: how evenly rows and columns change, and how the change lies to the base; each (n,).

    Without a base the last three are 0.
    """
    found = []
    for dim in (2, 1):
        energy = matrices.square().sum(dim)
        share = energy / energy.sum(1, keepdim=True).clamp_min(1e-30)
        even = -(share * share.clamp_min(1e-30).log()).sum(1) / max(float(np.log(share.shape[1])), 1e-6)
        found.append(even)
    if base is None:
        return (*found, *torch.zeros(3, len(matrices)))
    start = base.flatten(1)
    energy = matrices.square().sum(2)
    share = energy / energy.sum(1, keepdim=True).clamp_min(1e-30)
    inner, length = (matrices * start).sum(2), start.norm(dim=1)
    whole = inner.sum(1) / (energy.sum(1).sqrt() * start.norm()).clamp_min(1e-30)
    by_row = (share * inner / (energy.sqrt() * length).clamp_min(1e-30)).sum(1)
    usual = start.square().sum(1).mean().clamp_min(1e-30)
    there = ((share * length.square()).sum(1) / usual).clamp_min(1e-6).log() / 2
    return (*found, whole, by_row, there)


def _seen(matrices: Tensor, left: Tensor, right: Tensor, gram: Array) -> Array:
    """Of pairs as the first sees them: projection, disturbance, the same by rows, cosine by rows, ``(n, n, 4)``."""
    own = np.maximum(np.diag(gram), 1e-30)
    projection = np.clip(gram / own[:, None], -10, 10)
    within = torch.stack([
        (u.T @ matrices @ v).square().sum((1, 2)) for u, v in zip(left, right, strict=True)
    ]).double().numpy()  # fmt: skip
    energy = matrices.double().square().sum(2)
    share = energy / energy.sum(1, keepdim=True).clamp_min(1e-30)
    on_rows = (share @ energy.T).numpy()
    mine = np.maximum(np.diag(on_rows), 1e-30)
    unit = (matrices.double() / energy.sqrt().clamp_min(1e-30)[..., None]).float()
    alike = torch.stack([(s.float()[None] * (one * unit).sum(2)).sum(1) for s, one in zip(share, unit, strict=True)])
    return np.stack((
        projection, np.log(within / own[:, None] + 1e-6) / 2, np.log(on_rows / mine[:, None] + 1e-6) / 2,
        alike.double().numpy(),
    ), axis=2)  # fmt: skip


def _gram(delta: Tensor) -> Array:
    flat = delta.flatten(1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for part in flat.split(1 << 20, dim=1):
        total += part.double() @ part.double().T
    return total.numpy()


def _conflict(delta: Tensor) -> Array:
    """Share of opposite signs among elements that are large in both, ``(n, n)``; 0.5 where none are."""
    flat = delta.flatten(1)
    kept = max(1, int(_LARGE * flat.shape[1]))
    least = flat.abs().kthvalue(flat.shape[1] - kept + 1, dim=1).values
    large = flat.abs() >= least[:, None].clamp_min(1e-30)
    sign = (flat.sign() * large).float()
    both = large.float() @ large.float().T
    same = sign @ sign.T
    share = torch.where(both > 0, (both - same) / (2 * both.clamp_min(1)), torch.full_like(both, 0.5))
    found: Array = share.double().numpy()
    return found


def _profiles(energy: Tensor) -> Array:
    """Cosines of the square roots of energies by row (or column), ``(n, n)``: 1 where two change the same rows."""
    shape = energy.double().sqrt()
    shape = shape / shape.norm(dim=1, keepdim=True).clamp_min(1e-30)
    found: Array = (shape @ shape.T).numpy()
    return found


def _spectra(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors ``(n, out, r)``, singular values ``(n, r)``, right singular vectors ``(n, in, r)``.

    All of the values, unless both sides are longer than ``_SPECTRA``.
    """
    if min(matrices.shape[1:]) <= _SPECTRA:
        tall = matrices.shape[1] >= matrices.shape[2]
        work = matrices if tall else matrices.transpose(1, 2)
        squares = torch.stack([m.double().T @ m.double() for m in work])
        values, vectors = torch.linalg.eigh(squares)
        s = values.flip(1).clamp_min(0).sqrt()
        near = vectors.flip(2)[:, :, :_RANK]
        far = torch.stack([m.double() @ x for m, x in zip(work, near, strict=True)])
        # Directions that the matrix does not reach have no counterpart on the other side.
        head = s[:, None, : near.shape[2]]
        reached = head > 1e-6 * s[:, None, :1].clamp_min(1e-30)
        far = torch.where(reached, far / head.clamp_min(1e-30), torch.zeros_like(far))
        near = torch.where(reached, near, torch.zeros_like(near))
        u, v = (far, near) if tall else (near, far)
        return u.float(), s.float(), v.float()
    generator = torch.Generator().manual_seed(0)
    found = []
    for m in matrices:
        start = torch.randn(m.shape[1], 64, generator=generator)
        q = torch.linalg.qr(m @ (m.T @ (m @ start))).Q
        a, s, b = torch.linalg.svd(q.T @ m, full_matrices=False)
        found.append((q @ a, s, b.T))
    u, s, v = (torch.stack(parts) for parts in zip(*found, strict=True))
    return u, s, v


def _summary(terms: Array, shares: Array) -> Array:
    """Blocks ``(..., blocks, terms)`` with shares ``(..., blocks)`` as ``(..., terms · SUMMARIES)``."""
    weight = (shares / np.maximum(shares.sum(-1, keepdims=True), 1e-30))[..., None]
    inner = terms[..., 1:-1, :] if terms.shape[-2] > 2 else terms
    found = np.stack((
        (terms * weight).sum(-2), terms.max(-2), terms.min(-2), terms[..., 0, :], inner.mean(-2), terms[..., -1, :],
    ), axis=-1)  # fmt: skip
    flat: Array = found.reshape(*found.shape[:-2], -1)
    return flat


def _ordered(tensors: Mapping[str, Tensor], wiring: Wiring | None) -> list[str]:
    """Names of what is compared: floating-point tensors, in the order of use where the wiring knows it."""
    floats = [name for name in tensors if _floating(tensors, name)]
    if wiring is None or not wiring.roles:
        return sorted(floats)
    order = {name: i for i, name in enumerate(wiring.roles)}
    skipped = ("mean", "variance", "counter")
    kept = [n for n in floats if str(wiring.roles.get(n, "other")) not in skipped]
    return sorted(kept, key=lambda name: (order.get(name, len(order)), name))


def _floating(tensors: Mapping[str, Tensor], name: str) -> bool:
    dtype = getattr(tensors, "dtype", None)
    found = dtype(name) if callable(dtype) else tensors[name].dtype
    return bool(found.is_floating_point)


# -------------------------------------------------------------------- axes


class _Axes:
    """How far from a better matching the free axes of pairs are, gathered tensor by tensor."""

    def __init__(self, wiring: Wiring, models: int) -> None:
        from weightspace.wiring.places import places

        self.wiring, self.models = wiring, models
        self.places = places(wiring)
        self.costs: dict[str, Tensor] = {}

    def read(self, name: str, values: Tensor) -> None:
        """Add what one tensor ``(n, …)`` says of its axes."""
        unit = values.flatten(1).norm(dim=1).clamp_min(1e-30)
        scaled = values / unit.view(-1, *[1] * (values.dim() - 1))
        for factor, found_in in self.places.items():
            size = self.wiring.free[factor].size
            if size < 2 or size > _MATCHED or self.wiring.free[factor].over:
                continue
            for place in found_in:
                if place.tensor != name:
                    continue
                views = torch.stack([place.view(x) for x in scaled])
                alike = torch.einsum("imr,jnr->ijmn", views, views)
                self.costs[factor] = self.costs[factor] + alike if factor in self.costs else alike

    def of(self, blocks: Sequence[str]) -> Array:
        """Of each block, the mean over its axes of 1 − similarity as it is / best matched: ``(n, n, blocks)``."""
        from scipy.optimize import linear_sum_assignment

        gains = {}
        for factor, costs in self.costs.items():
            gain = np.zeros((self.models, self.models))
            for i in range(self.models):
                for j in range(i + 1, self.models):
                    cost = costs[i, j].numpy()
                    row, column = linear_sum_assignment(cost, maximize=True)
                    best = float(cost[row, column].sum())
                    gain[i, j] = gain[j, i] = max(0.0, 1 - float(np.trace(cost)) / max(best, 1e-12))
            gains[factor] = gain
        found = np.zeros((self.models, self.models, len(blocks)))
        for b, name in enumerate(blocks):
            mine = [gain for f, gain in gains.items() if any(p.tensor == name for p in self.places[f])]
            if mine:
                found[..., b] = np.mean(mine, axis=0)
        return found

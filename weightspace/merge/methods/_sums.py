"""Sums of sparsified task vectors: what DARE, Breadcrumbs and DELLA do once each has chosen what to keep."""

from __future__ import annotations

from collections.abc import Sequence

from weightspace.merge.method import Tensor, wide
from weightspace.merge.methods.ties import elect


def combine(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], *, electing: bool, normalize: bool, scale: float
) -> Tensor:
    """θ₀ + λ Σ wᵢ τ̂ᵢ, of those only that have the elected sign where ``electing``; overwrites ``deltas``.

    ``normalize``: divided by Σ wᵢ, of those that agree where ``electing``.
    """
    weighted = [delta.mul_(weight) for delta, weight in zip(deltas, weights, strict=True)]
    if electing:
        mixed = elect(weighted, weights, normalize)
    else:
        mixed = wide(weighted[0])
        for delta in weighted[1:]:
            mixed.add_(delta)
        mixed = mixed.to(weighted[0].dtype)
        total = sum(weights)
        if normalize and abs(total) >= 1e-8:
            mixed.div_(total)
    return mixed.mul_(scale).add_(base)

"""Model Stock: how far to go from the base is read off the angle between fine-tunes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from weightspace.merge.method import Piece, Stream, Tensor, TwoPass


@dataclass(frozen=True)
class ModelStock(TwoPass):
    """t θ̄ + (1 − t) θ₀, t = N cos α / (1 + (N − 1) cos α) (Jang et al. 2024, "Model Stock").

    θ̄ is the mean of the N fine-tunes and cos α the mean cosine between their task vectors. Per tensor, as in the paper
    (layer-wise); ``scope="model"`` takes one angle for all. Made for fine-tunes on one task; weights play no part.
    Where the denominator vanishes the base is kept.
    """

    name: ClassVar[str] = "model-stock"
    paper: ClassVar[str] = "Jang et al. (2024), Model Stock"
    needs_base: ClassVar[bool] = True
    count: ClassVar[tuple[int, int | None]] = (2, None)

    def survey(self, stream: Stream, weights: Sequence[float]) -> float:
        """t."""
        n = stream.count
        gram = torch.zeros(n, n, dtype=torch.float64)
        for piece in stream:
            deltas = torch.stack([piece.delta(i) for i in range(n)])
            gram += (deltas @ deltas.T).double()
        norms = gram.diagonal().clamp_min(0).sqrt()
        pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
        cosines = [float(gram[i, j] / (norms[i] * norms[j]).clamp_min(1e-6)) for i, j in pairs]
        cosine = sum(max(-1.0, min(1.0, c)) for c in cosines) / len(pairs)
        denominator = 1 + (n - 1) * cosine
        return n * cosine / denominator if abs(denominator) >= 1e-6 else 0.0

    def merge(self, piece: Piece, weights: Sequence[float], state: float) -> Tensor:
        mean = piece.model(0).clone()
        for i in range(1, piece.count):
            mean.add_(piece.model(i))
        return mean.mul_(state / piece.count).add_(piece.base, alpha=1 - state)

"""Weights weighed by how far their magnitudes and directions moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from weightspace.merge.method import Merger, Models, Prepared, Tensor, in_range
from weightspace.merge.methods.wudi import as_matrices, from_matrix, input_dim


@dataclass(frozen=True)
class Widen(Prepared):
    """θ₀ + Σ wᵢ ½(sᵢᵐ + sᵢᵈ) τᵢ with a score per input of a weight (Yu et al. 2024, "WIDEN").

    Each column of a weight (outputs, inputs) has a magnitude, its length, and a direction. How far each moved from the
    base, |m − m₀| and 1 − cos(d, d₀), is ranked among the columns of the model (0 to 1), the softmax of the ranks over
    models is the score, and columns that rank above ``threshold`` times the model's mean get ``calibration`` instead.
    Vectors are scored by |τᵢ| itself. Per tensor, as in the original; convolutions are matrices over input channels and
    kernel positions, and which tensors are weights is decided as by `Wudi`.

    ``threshold`` and ``calibration``: 1 and 1 in the original.
    """

    threshold: float = 1.0
    calibration: float = 1.0

    name: ClassVar[str] = "widen"
    paper: ClassVar[str] = "Yu et al. (2024), Extend model merging from fine-tuned to pre-trained large language models"
    needs_base: ClassVar[bool] = True

    def check(self, count: int) -> None:
        in_range(self.threshold, 0, float("inf"), "threshold")

    def prepare(self, models: Models) -> Merger:
        def merge(name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
            assert base is not None
            tau = torch.stack([t - base for t in tensors])
            shares = torch.tensor(weights).to(tau).view(-1, *[1] * base.dim())
            dim = input_dim(models, name, base)
            if dim is None:
                return base + (tau * self._scores(tau.abs().flatten(1)).view_as(tau) * shares).sum(0)
            first = as_matrices(base[None], dim)[0]
            moved = as_matrices(tau, dim)
            now = first + moved
            lengths = (now.norm(dim=1) - first.norm(dim=0)).abs()
            turns = 1 - torch.cosine_similarity(now, first[None], dim=1)
            scores = (self._scores(ranks(lengths)) + self._scores(ranks(turns))) / 2
            mixed = (moved * scores[:, None] * shares.view(-1, 1, 1)).sum(0)
            return base + from_matrix(mixed, base.shape, dim)

        return merge

    def _scores(self, significance: Tensor) -> Tensor:
        """(models, elements) of how significant each element is in each model."""
        above = significance > significance.mean(1, keepdim=True) * self.threshold
        return torch.where(above, torch.tensor(self.calibration).to(significance), significance.softmax(0))


def ranks(values: Tensor) -> Tensor:
    """The rank of each element in its row, from 0 to 1 (exclusive); equal ones in their order."""
    order = values.argsort(dim=1, stable=True)
    places = (torch.arange(values.shape[1]).to(values) / values.shape[1]).expand(values.shape)
    return torch.zeros_like(values).scatter(1, order, places)

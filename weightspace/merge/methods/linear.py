"""Weighted averages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from weightspace.errors import MergeError
from weightspace.merge.method import Elementwise, Tensor


@dataclass(frozen=True)
class Linear(Elementwise):
    """The weighted mean of the models, Σ wᵢ θᵢ / Σ wᵢ (Wortsman et al. 2022, "Model soups").

    Element by element, so per tensor and global are the same. The base takes no part.

    ``normalize``: divide by the sum of the weights; without it the result is Σ wᵢ θᵢ.
    """

    normalize: bool = True

    name: ClassVar[str] = "linear"
    paper: ClassVar[str] = "Wortsman et al. (2022), Model soups"

    def merge(self, name: str, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        total = sum(weights) if self.normalize else 1.0
        if total == 0:
            raise MergeError("linear: the weights sum to zero, so there is no mean; change them or say normalize=False")
        result = models[0] * (weights[0] / total)
        for model, weight in zip(models[1:], weights[1:], strict=True):
            result.add_(model, alpha=weight / total)
        return result

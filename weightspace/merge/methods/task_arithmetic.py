"""Sums of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from weightspace.merge.method import Elementwise, Tensor, wide


@dataclass(frozen=True)
class TaskArithmetic(Elementwise):
    """θ₀ + λ Σ wᵢ (θᵢ − θ₀) (Ilharco et al. 2023, "Editing models with task arithmetic").

    Element by element, so per tensor and global are the same.

    ``scale``: λ; 0.4 is what Yadav et al. (2023) recommend without validation data. ``normalize``: divide the sum by
    Σ wᵢ, which with λ = 1 is the weighted mean.
    """

    scale: float = 0.4
    normalize: bool = False

    name: ClassVar[str] = "task-arithmetic"
    paper: ClassVar[str] = "Ilharco et al. (2023), Editing models with task arithmetic"
    needs_base: ClassVar[bool] = True
    narrow: ClassVar[bool] = True

    def merge(self, name: str, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        assert base is not None
        total = sum(weights) if self.normalize else 1.0
        total = 1.0 if abs(total) < 1e-8 else total
        result = wide((models[0] - base).mul_(weights[0]))
        for model, weight in zip(models[1:], weights[1:], strict=True):
            # Narrow types are rounded after each product and after the sum.
            result.add_((model - base).mul_(weight)) if base.itemsize < 4 else result.add_(model - base, alpha=weight)
        return result.to(base.dtype).mul_(self.scale / total).add_(base)

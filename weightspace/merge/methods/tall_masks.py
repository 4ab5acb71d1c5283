"""TALL-masks: which task uses which weight; and Consensus, which keeps what several use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from weightspace.errors import MergeError
from weightspace.merge.method import Elementwise, PerModel, Tensor, in_range, per_model


def task_mask(delta: Tensor, multi: Tensor, strictness: float) -> Tensor:
    """|τₜ| > λₜ |τ − τₜ|: which elements of the multi-task vector a task uses (Wang et al. 2024)."""
    return delta.abs() > (multi - delta).abs().mul_(strictness)


@dataclass(frozen=True)
class TallMasks(Elementwise):
    """θ₀ + mₜ ⊙ τ, mₜ = [|τₜ| > λₜ |τ − τₜ|], τ = α Σ wᵢ τᵢ (Wang et al. 2024, "Localizing task information").

    The weights of one task, found again in the multi-task vector: θ₀, τ and a bit per weight and task hold all tasks.
    Element by element, so per tensor and global are the same.

    ``task``: which one (its place among the models). ``strictness``: λₜ, one number or one per model; the paper
    chooses it per task from 0.2 to 0.6. ``scale``: α, 1 in the paper.
    """

    task: int = 0
    strictness: PerModel = 0.4
    scale: float = 1.0

    name: ClassVar[str] = "tall-masks"
    paper: ClassVar[str] = "Wang et al. (2024), Localizing task information"
    needs_base: ClassVar[bool] = True

    def check(self, count: int) -> None:
        in_range(per_model(self.strictness, count, "strictness"), 0, float("inf"), "strictness")
        if not 0 <= self.task < count:
            raise MergeError(f"tall-masks: task is {self.task}; a model's place from 0 to {count - 1} was expected")

    def merge(self, name: str, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        assert base is not None
        multi = _sum(base, models, weights).mul_(self.scale)
        mask = task_mask(models[self.task] - base, multi, per_model(self.strictness, len(models), "")[self.task])
        return multi.mul_(mask).add_(base)


@dataclass(frozen=True)
class Consensus(Elementwise):
    """θ₀ + α m ⊙ Σ wᵢ τᵢ, m = [at least k tasks use the weight] (Wang et al. 2024, "Localizing task information").

    Drops what one task alone uses (selfish weights) and what none uses (catastrophic ones), by their TALL-masks, which
    are made with the unscaled sum. Element by element, so per tensor and global are the same.

    ``least``: k, 2 in the paper. ``strictness``: λₜ of the masks, 0.2 to 0.6 in the paper. ``scale``: α, tuned
    on validation data (0.3 is what it starts from).
    """

    least: int = 2
    strictness: PerModel = 0.4
    scale: float = 0.3

    name: ClassVar[str] = "consensus"
    paper: ClassVar[str] = "Wang et al. (2024), Localizing task information"
    needs_base: ClassVar[bool] = True
    count: ClassVar[tuple[int, int | None]] = (2, None)

    def check(self, count: int) -> None:
        in_range(per_model(self.strictness, count, "strictness"), 0, float("inf"), "strictness")
        if not 0 <= self.least <= count:
            raise MergeError(f"consensus: least is {self.least}; 0 to {count} tasks were expected")

    def merge(self, name: str, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        assert base is not None
        multi = _sum(base, models, weights)
        users = torch.zeros_like(base)
        for model, strictness in zip(models, per_model(self.strictness, len(models), ""), strict=True):
            users.add_(task_mask(model - base, multi, strictness))
        return multi.mul_(users >= self.least).mul_(self.scale).add_(base)


def _sum(base: Tensor, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = (models[0] - base).mul_(weights[0])
    for model, weight in zip(models[1:], weights[1:], strict=True):
        total.add_(model - base, alpha=weight)
    return total

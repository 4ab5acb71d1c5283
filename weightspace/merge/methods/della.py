"""DELLA: drop at random, the small ones more often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from weightspace.errors import MergeError
from weightspace.merge.draws import TorchMasks, uniform
from weightspace.merge.method import PerModel, PerTensor, Tensor, in_range, per_model
from weightspace.merge.methods._sums import combine
from weightspace.merge.methods.dare import Rescale


@dataclass(frozen=True)
class Della(PerTensor):
    """MagPrune, elect, fuse (Deep et al. 2024, "DELLA-Merging").

    In each row of a tensor (a vector is one row) element j of task vector i is kept with the probability
    pⱼ = p − ε + 2ε · rank(|τⱼ|) / (n − 1), the largest most likely, and divided by pⱼ; then signs are elected and what
    agrees is averaged. Ranks are within rows, so per tensor and global are the same. Equal magnitudes rank in the
    order of their places.

    ``density``: p. ``epsilon``: ε; both one number or one per model, 0 < p ± ε < 1. ``rescale``: "inverse" as in the
    paper; "norm" restores the L1 norm of the tensor instead, as mergekit does; "none". ``electing``: without it all
    are summed. ``normalize``: average, else sum. ``scale``: λ. ``seed``: of the masks.
    ``masks``: `TorchMasks` draws mergekit's masks of a seed instead.
    """

    density: PerModel = 0.3
    epsilon: PerModel = 0.15
    scale: float = 1.0
    rescale: Rescale = "inverse"
    electing: bool = True
    normalize: bool = True
    seed: int = 0
    masks: TorchMasks | None = None

    name: ClassVar[str] = "della"
    paper: ClassVar[str] = "Deep et al. (2024), DELLA-Merging"
    needs_base: ClassVar[bool] = True
    narrow: ClassVar[bool] = True

    def check(self, count: int) -> None:
        density, epsilon = per_model(self.density, count, "density"), per_model(self.epsilon, count, "epsilon")
        in_range(density, 0, 1, "density", open_low=True)
        for p, e in zip(density, epsilon, strict=True):
            if p < 1 and not (e >= 0 and p - e > 0 and p + e < 1):
                raise MergeError(f"della: density {p} and epsilon {e}; 0 < density ± epsilon < 1 was expected")
        if self.rescale not in ("inverse", "norm", "none"):
            raise MergeError(f"della: rescale is {self.rescale!r}; 'inverse', 'norm' or 'none' was expected")

    @property
    def in_order(self) -> bool:
        return self.masks is not None

    def merge(self, name: str, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        assert base is not None
        densities, spreads = per_model(self.density, len(models), ""), per_model(self.epsilon, len(models), "")
        kept = [
            self._prune(model - base, p, e, name, i)
            for i, (model, p, e) in enumerate(zip(models, densities, spreads, strict=True))
        ]
        return combine(base, kept, weights, electing=self.electing, normalize=self.normalize, scale=self.scale)

    def _prune(self, delta: Tensor, p: float, epsilon: float, name: str, model: int) -> Tensor:
        if p >= 1 or not delta.numel():
            return delta
        rows = delta.reshape(1, -1) if delta.dim() < 2 else delta
        order = rows.abs().argsort(stable=True, dim=-1)
        ranks = torch.empty_like(rows)
        if rows.itemsize < 4:  # places that the type can tell apart, as mergekit counts them
            places = torch.arange(1, rows.shape[-1] + 1).to(rows.dtype)
            steps = (places - 1).div_((places[-1] - 1).clamp(min=1))
        else:
            steps = torch.linspace(0, 1, rows.shape[-1]) if rows.shape[-1] > 1 else torch.full((1,), 0.5)
        ranks.scatter_(-1, order, steps.to(rows.dtype).expand_as(rows))
        chance = ranks.mul_(2 * epsilon).add_(p - epsilon)
        if self.masks:
            kept = self.masks.draw(chance.reshape(-1), rows.numel())
        else:
            kept = uniform(self.seed, name, model, 0, rows.numel()) < chance.reshape(-1)
        pruned = torch.where(kept.reshape(rows.shape), rows, 0)
        if self.rescale == "inverse":
            pruned = pruned / chance
        elif self.rescale == "norm":
            before, after = rows.abs().sum(), pruned.abs().sum()
            if before >= 1e-7 and after >= 1e-7:
                pruned = pruned * (before / after)
        return pruned.reshape(delta.shape)

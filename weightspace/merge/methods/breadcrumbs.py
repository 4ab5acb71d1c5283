"""Breadcrumbs: without the largest and without the smallest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from weightspace.errors import MergeError
from weightspace.merge.method import PerModel, Piece, Stream, Tensor, TwoPass, in_range, per_model
from weightspace.merge.methods._sums import combine
from weightspace.merge.methods.ties import ranked, trim


@dataclass(frozen=True)
class Breadcrumbs(TwoPass):
    """θ₀ + λ Σ wᵢ mᵢ ⊙ τᵢ, mᵢ without outliers and noise (Davari & Belilovsky 2024, "Model Breadcrumbs").

    Per tensor (the paper's layer-wise masks). Of each task vector the share ``gamma`` of the largest magnitudes is
    dropped, and the smallest until ``density`` is left.

    ``density``: 0.14, and ``gamma``: 0.01, drop the paper's 85 % below and 1 % above; numbers, or one per model.
    ``scale``: λ, 0.3 in the paper. ``electing``: sum only what has the elected sign. ``normalize``: divide by the
    weights.
    """

    density: PerModel = 0.14
    gamma: PerModel = 0.01
    scale: float = 0.3
    electing: bool = False
    normalize: bool = False

    name: ClassVar[str] = "breadcrumbs"
    paper: ClassVar[str] = "Davari & Belilovsky (2024), Model Breadcrumbs"
    needs_base: ClassVar[bool] = True
    narrow: ClassVar[bool] = True

    def check(self, count: int) -> None:
        super().check(count)
        density, gamma = per_model(self.density, count, "density"), per_model(self.gamma, count, "gamma")
        in_range(density, 0, 1, "density")
        in_range(gamma, 0, 1, "gamma")
        if any(d + g > 1 + 1e-9 and d < 1 for d, g in zip(density, gamma, strict=True)):
            raise MergeError(f"breadcrumbs: density {self.density} and gamma {self.gamma} are more than all together")

    def survey(self, stream: Stream, weights: Sequence[float]) -> tuple[tuple[float, float], ...]:
        """The least and the largest magnitude that is kept of each model."""
        n, out = stream.numel, []
        densities, gammas = per_model(self.density, stream.count, ""), per_model(self.gamma, stream.count, "")
        for i, (density, gamma) in enumerate(zip(densities, gammas, strict=True)):
            if density >= 1:
                out.append((0.0, float("inf")))
                continue
            top = min(int(gamma * n), n - int(density * n))
            kept = int(density * n)
            if not kept:
                out.append((float("inf"), 0.0))
                continue
            out.append((ranked(stream, i, top + kept), ranked(stream, i, top + 1) if top else float("inf")))
        return tuple(out)

    def merge(self, piece: Piece, weights: Sequence[float], state: tuple[tuple[float, float], ...]) -> Tensor:
        base = piece.base
        kept = []
        for i, (least, most) in enumerate(state):
            delta = trim(piece.model(i) - base, least)
            kept.append(delta if most == float("inf") else torch.where(delta.abs() <= most, delta, 0))
        return combine(base, kept, weights, electing=self.electing, normalize=self.normalize, scale=self.scale)

"""Isotropic merging: one length for all singular directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from weightspace.merge.method import PerTensor, Tensor, in_range
from weightspace.merge.methods.tsv import as_matrix, is_matrix, leading, orthogonal, weighted


@dataclass(frozen=True)
class IsoC(PerTensor):
    """θ₀ + α σ̄ U Vᵀ of Σ wᵢ τᵢ = U Σ Vᵀ, σ̄ the mean singular value (Marczak et al. 2025, "No task left behind").

    Per tensor, as in the original (layer by layer). Tensors of more than two dims are matrices of their first dim by
    the rest; the original takes the mean there, as it does (and as here) for vectors.

    ``scale``: α, tuned on validation data in the paper, between 1 and 2 for eight vision tasks.
    """

    scale: float = 1.0

    name: ClassVar[str] = "iso-c"
    paper: ClassVar[str] = "Marczak et al. (2025), No task left behind"
    needs_base: ClassVar[bool] = True

    def merge(self, name: str, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        assert base is not None
        deltas = weighted(base, models, weights)
        total = sum(deltas[1:], deltas[0])
        if not is_matrix(base):
            return base + self.scale * total / len(deltas)
        u, s, vh = torch.linalg.svd(as_matrix(total), full_matrices=False)
        merged: Tensor = (u @ vh).mul_(s.mean() * self.scale)
        return merged.reshape(base.shape).add_(base)


@dataclass(frozen=True)
class IsoCts(PerTensor):
    """Iso-C with directions of the tasks' own (Marczak et al. 2025, "No task left behind").

    The leading singular directions of Σ wᵢ τᵢ, the share ``common`` of the rank, are joined by each task's leading ones
    in what is left of its matrix outside of them, in equal parts; all are made orthogonal, and get their mean singular
    value. Per tensor, as in the original; tensors that are no matrices as in Iso-C.

    ``common``: share of the common directions, 0.8 in the paper. ``scale``: α, as in Iso-C.
    """

    common: float = 0.8
    scale: float = 1.0

    name: ClassVar[str] = "iso-cts"
    paper: ClassVar[str] = "Marczak et al. (2025), No task left behind"
    needs_base: ClassVar[bool] = True

    def check(self, count: int) -> None:
        in_range(self.common, 0, 1, "common")

    def merge(self, name: str, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        assert base is not None
        deltas = weighted(base, models, weights)
        total = sum(deltas[1:], deltas[0])
        if not is_matrix(base):
            return base + self.scale * total / len(deltas)
        matrix = as_matrix(total)
        rank, tasks = min(matrix.shape), len(deltas)
        own = round((rank - int(rank * self.common)) / tasks)  # directions of each task
        own = min(own, rank // tasks)
        shared = leading(matrix, rank - own * tasks)
        parts = []
        for delta in deltas if own else ():
            rest = as_matrix(delta)
            parts.append(leading(rest - shared[0] @ (shared[0].T @ rest), own))
        u, s, v = (torch.cat(list(p), -1) for p in zip(*parts, shared, strict=True))
        merged = (orthogonal(u) @ orthogonal(v).T).mul_(s.mean() * self.scale)
        return merged.reshape(base.shape).add_(base)

"""TSV-Merge: singular vectors of the tasks, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from weightspace.merge.method import PerTensor, Tensor


@dataclass(frozen=True)
class TsvM(PerTensor):
    """θ₀ + α Û Σ V̂ᵀ from the tasks' leading singular vectors (Gargiulo et al. 2025, "Task Singular Vectors").

    Of each task matrix wᵢ τᵢ the rank/N largest singular triplets are kept; U and V of all tasks, side by side, are
    each replaced by the nearest orthogonal matrix (U = PΣQᵀ → PQᵀ), which takes the interference away. Per tensor, as
    in the original (layer by layer). Tensors of more than two dims are matrices of their first dim by the rest;
    the original takes the mean there, as it does (and as here) for vectors.

    ``scale``: α, 1 in the paper.
    """

    scale: float = 1.0

    name: ClassVar[str] = "tsv-m"
    paper: ClassVar[str] = "Gargiulo et al. (2025), Task Singular Vectors"
    needs_base: ClassVar[bool] = True

    def merge(self, name: str, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        assert base is not None
        deltas = weighted(base, models, weights)
        if not is_matrix(base):
            return base + self.scale * sum(deltas[1:], deltas[0]) / len(deltas)
        kept = max(1, min(base.shape[0], base.numel() // base.shape[0]) // len(deltas))
        parts = [leading(as_matrix(delta), kept) for delta in deltas]
        u, s, v = (torch.cat(list(p), -1) for p in zip(*parts, strict=True))
        merged = ((orthogonal(u) * s) @ orthogonal(v).T).reshape(base.shape)
        return merged.mul_(self.scale).add_(base)


def weighted(base: Tensor, models: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """The task vectors of a tensor, each times its weight."""
    return [(model - base) * weight for model, weight in zip(models, weights, strict=True)]


def is_matrix(tensor: Tensor) -> bool:
    """Whether it has two dims or more, none of them trivial for a singular value decomposition."""
    return tensor.dim() >= 2 and min(tensor.shape[0], tensor.numel() // max(tensor.shape[0], 1)) > 1


def as_matrix(tensor: Tensor) -> Tensor:
    """The first dim by the rest."""
    return tensor.reshape(tensor.shape[0], -1)


def leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular triplets: U (rows, count), S (count,), V (columns, count)."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :count], s[:count], vh[:count].T


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (or rows): PQᵀ of PΣQᵀ."""
    p, _, qh = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = p @ qh
    return nearest

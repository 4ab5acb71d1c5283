"""What models share, and what each has alone, compressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from weightspace.errors import MergeError
from weightspace.merge.method import PerTensor, Tensor, in_range


@dataclass(frozen=True)
class Twin(PerTensor):
    """A shared expert θₛ = θ₀ + λ Σ wᵢ τᵢ plus what each model has beyond it (Lu et al. 2024, "Twin-Merging").

    The exclusive expert of model i is θᵢ − θₛ, of which the leading singular vectors are kept, tensor by tensor as in
    the original; a router then weighs the experts for each input: θₛ + Σ rᵢ vᵢ. A file holds one network, so the result
    is one of two: with ``expert=None`` the static form, where every rᵢ is ``share`` / n; with ``expert=i`` (counted
    from 0) what a router gives that is sure of model i. `experts` gives the compressed experts themselves,
    `with_experts` puts them back with any rᵢ.

    ``scale``: λ (0.3). ``rank``: share of the singular vectors of a matrix that is kept (at least one); vectors are
    kept whole. ``share``: Σ rᵢ of the static form.
    """

    scale: float = 0.3
    rank: float = 0.1
    expert: int | None = None
    share: float = 1.0

    name: ClassVar[str] = "twin-merging"
    paper: ClassVar[str] = "Lu et al. (2024), Twin-Merging: dynamic integration of modular expertise"
    needs_base: ClassVar[bool] = True

    def check(self, count: int) -> None:
        in_range(self.rank, 0, 1, "rank")
        if self.expert is not None and not 0 <= self.expert < count:
            raise MergeError(f"expert is {self.expert}; the {count} models count from 0")

    def merge(self, name: str, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        assert base is not None
        vectors = [w * (m - base) for m, w in zip(models, weights, strict=True)]
        shared = base + self.scale * sum(vectors, torch.zeros(()))
        if self.expert is not None:
            return shared + whole(compressed(models[self.expert] - shared, self.rank), shared)
        part = self.share / len(models)
        return shared + part * sum((whole(compressed(m - shared, self.rank), m) for m in models), torch.zeros(()))


Factors = tuple[Tensor, ...]
"""``(up, down)`` of a matrix, or the tensor itself alone."""


def compressed(delta: Tensor, rank: float) -> Factors:
    """The leading share of singular vectors of (outputs, …): up (outputs, k) and down (k, rest). Vectors stay whole."""
    if delta.dim() < 2:
        return (delta,)
    u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    kept = max(1, round(rank * len(s))) if rank > 0 else 0
    return u[:, :kept] * s[:kept], v[:kept]


def whole(factors: Factors, like: Tensor) -> Tensor:
    """The inverse of `compressed`, but for what was dropped."""
    return (factors[0] if len(factors) == 1 else factors[0] @ factors[1]).view_as(like)


def experts(
    shared: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], rank: float = 0.1
) -> list[dict[str, Tensor]]:
    """The exclusive experts of models beyond a shared one: per model ``NAME.up`` and ``NAME.down``, or ``NAME``.

    ``shared``: `Twin` with ``share=0``, or any merge. Small enough to be kept beside it; float32.
    """
    found = []
    for model in models:
        parts: dict[str, Tensor] = {}
        for name in shared:
            if not shared[name].is_floating_point():
                continue
            factors = compressed(model[name].float() - shared[name].float(), rank)
            names = (name,) if len(factors) == 1 else (f"{name}.up", f"{name}.down")
            parts |= {n: f.contiguous() for n, f in zip(names, factors, strict=True)}
        found.append(parts)
    return found


def with_experts(
    shared: Mapping[str, Tensor], parts: Sequence[Mapping[str, Tensor]], shares: Sequence[float]
) -> dict[str, Tensor]:
    """The shared expert plus Σ rᵢ times the experts, as a router would have it for one input."""
    out = {}
    for name, tensor in shared.items():
        result = tensor.float() if tensor.is_floating_point() else tensor
        for part, share in zip(parts, shares, strict=True):
            names = (name,) if name in part else (f"{name}.up", f"{name}.down")
            if names[0] in part:
                result = result + share * whole(tuple(part[n] for n in names), tensor)
        out[name] = result.to(tensor.dtype)
    return out

"""Task vectors shifted together by projected gradient descent, without data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from weightspace.errors import MergeError
from weightspace.merge.method import Merger, Models, Prepared, Tensor, in_range
from weightspace.merge.methods.wudi import as_matrices, from_matrix, input_dim


@dataclass(frozen=True)
class Doge(Prepared):
    """θ₀ + Σ λᵢ wᵢ trim(τᵢ + Δ) (Wei et al. 2025, "DOGE": adaptive projective gradient descent).

    Per weight, λᵢ = ``eta`` / ‖τᵢ‖, and the shift Δ minimises Σⱼ Σ_rows ⟨τⱼ, Σ λᵢ(τᵢ + Δ) − τⱼ⟩² (what merging does to
    each task to first order, a task's gradient standing against its task vector) by Adam from 0, with gradients
    projected off the subspace that the tasks share: the leading 1/``subspace`` of left singular vectors of the joined
    leading vectors of all τᵢ. Trimming keeps the ``density`` largest elements of τᵢ; over the whole model in the
    original, per tensor here. Layer by layer, otherwise as in the original.

    ``eta``, ``subspace``, ``density``, ``steps``, ``rate``: 0.07, 6, 0.3, 400 and 1e-4 in the original's vision
    experiments; ``relative=True`` takes λᵢ = ``eta`` · mean ‖τ‖ / ‖τᵢ‖ and ``rate`` in root mean squares of the τᵢ, for
    task vectors of other sizes. ``others``: what other tensors than weights (biases, norms, tables) are, ``"base"`` as
    in the original or the ``"mean"`` of the models. Which tensors are weights is decided as by `Wudi`.

    Memory: one tensor in all models, a few times.
    """

    eta: float = 0.07
    density: float = 0.3
    subspace: float = 6.0
    steps: int = 400
    rate: float = 1e-4
    relative: bool = False
    others: Literal["base", "mean"] = "base"

    name: ClassVar[str] = "doge"
    paper: ClassVar[str] = "Wei et al. (2025), Modeling multi-task merging as adaptive projective gradient descent"
    needs_base: ClassVar[bool] = True

    def check(self, count: int) -> None:
        in_range(self.density, 0, 1, "density", open_low=True)
        in_range(self.subspace, 1, float("inf"), "subspace")
        in_range(self.steps, 0, float("inf"), "steps")
        if self.others not in ("base", "mean"):
            raise MergeError(f"others is {self.others!r}; 'base' or 'mean' was expected")

    def prepare(self, models: Models) -> Merger:
        def merge(name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
            assert base is not None
            tau = torch.stack([t - base for t in tensors])
            shares = torch.tensor(weights).to(tau)
            dim = input_dim(models, name, base)
            if dim is None:
                if self.others == "base":
                    models.notes[name] = "no weight of a linear operation: the base's"
                    return base.clone()
                mixed: Tensor = torch.tensordot(shares / shares.sum(), tau, 1)
                return base + mixed
            norms = tau.flatten(1).norm(dim=1)
            unit = float(norms.mean()) if self.relative else 1.0
            inverse = torch.where(norms > 0, unit / norms.clamp(min=1e-30), torch.zeros(()))
            scales = self.eta * inverse * shares
            front = as_matrices(tau, dim)
            shifted = trimmed(front, self._shift(front, scales), self.density)
            return base + from_matrix(torch.tensordot(scales, shifted, 1), base.shape, dim)

        return merge

    def _shift(self, tau: Tensor, scales: Tensor) -> Tensor:
        """Δ (outputs, inputs) of task vectors (models, outputs, inputs) and λ (models,)."""
        delta = torch.zeros_like(tau[0])
        if self.steps == 0 or not bool(tau.any()):
            return delta
        basis = shared(tau, self.subspace)
        rate = self.rate * (float(tau.square().mean()) ** 0.5 if self.relative else 1.0)
        optimiser = torch.optim.Adam([delta], lr=rate)
        total, mixed, own = scales.sum(), torch.tensordot(scales, tau, 1), tau.square().sum(2)
        rows = tau.transpose(0, 1).contiguous()
        for _ in range(self.steps):
            # Row by row ⟨τⱼ, Σ λ(τ + Δ) − τⱼ⟩: (outputs, models).
            residual = torch.bmm(rows, (mixed + total * delta).unsqueeze(2)).squeeze(2) - own.T
            gradient = 2 * total * torch.bmm(residual.unsqueeze(1), rows).squeeze(1)
            delta.grad = gradient - basis @ (basis.T @ gradient)
            optimiser.step()
        return delta


def shared(tau: Tensor, subspace: float) -> Tensor:
    """The subspace that the outputs of task vectors (models, outputs, inputs) share: orthonormal columns."""
    models, rank = len(tau), min(tau.shape[1:])
    each = max(1, rank // models)
    left = torch.cat([torch.linalg.svd(t, full_matrices=False)[0][:, :each] for t in tau], 1)
    kept = int(rank / subspace)
    basis: Tensor = torch.linalg.svd(left, full_matrices=False)[0][:, :kept]
    return basis


def trimmed(tau: Tensor, shift: Tensor, density: float) -> Tensor:
    """τᵢ + Δ at the ``density`` largest elements of each τᵢ, zero elsewhere."""
    flat = tau.flatten(1).abs()
    kept = max(1, int(density * flat.shape[1]))
    least = flat.topk(kept, dim=1).values[:, -1:].unsqueeze(-1)
    return (tau + shift) * (tau.abs() >= least)

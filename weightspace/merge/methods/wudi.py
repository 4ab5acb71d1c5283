"""Task vectors that keep out of each other's way, layer by layer, without data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from weightspace.errors import MergeError
from weightspace.merge.method import Merger, Models, Prepared, Tensor, in_range


@dataclass(frozen=True)
class Wudi(Prepared):
    """θ₀ + λ τ, where τ minimises Σ wᵢ ‖(τ − τᵢ) τᵢᵀ‖² / ‖τᵢ‖² (Cheng et al. 2025, "WUDI-Merging").

    The rows of τᵢ (outputs, inputs) span about what the layer's inputs span, so that this is the interference on the
    inputs of each task. Per linear layer, as in the original: Adam starts at Σ τᵢ and stops early, after ``steps`` of
    ``rate`` (300 and 1e-5 in the paper, for task vectors of a few 1e-4 per element; ``relative=True`` counts ``rate``
    in root mean squares of the τᵢ instead). ``steps=0`` is the exact minimum, which equals RegMean with τᵢᵀτᵢ for the
    inputs' second moments. Convolutions are matrices over input channels and kernel positions. ``others``: what other
    tensors (biases, norms, tables) get, the ``"mean"`` or the ``"sum"`` of their task vectors. ``scale``: λ, 1.

    A wiring is not needed; where one is given it says which tensors are contracted and over which dim (else every
    tensor of two or more dims is a weight (outputs, inputs, …)).

    Memory: one tensor in all models, and two (inputs, inputs).
    """

    scale: float = 1.0
    steps: int = 300
    rate: float = 1e-5
    relative: bool = False
    others: Literal["mean", "sum"] = "mean"

    name: ClassVar[str] = "wudi"
    paper: ClassVar[str] = "Cheng et al. (2025), Whoever started the interference should end it"
    needs_base: ClassVar[bool] = True

    def check(self, count: int) -> None:
        if self.others not in ("mean", "sum"):
            raise MergeError(f"others is {self.others!r}; 'mean' or 'sum' was expected")
        in_range(self.steps, 0, float("inf"), "steps")
        in_range(self.rate, 0, float("inf"), "rate")

    def prepare(self, models: Models) -> Merger:
        def merge(name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
            assert base is not None
            tau = torch.stack([t - base for t in tensors])
            dim = input_dim(models, name, base)
            if dim is None:
                share = sum(weights) if self.others == "mean" else 1.0
                total: Tensor = torch.tensordot(torch.tensor(weights).to(tau), tau, 1)
                return base + total * (self.scale / share)
            front = as_matrices(tau, dim)
            found = self._minimum(front, torch.tensor(weights).to(tau))
            return base + self.scale * from_matrix(found, base.shape, dim)

        return merge

    def _minimum(self, tau: Tensor, weights: Tensor) -> Tensor:
        """(outputs, inputs) of (models, outputs, inputs)."""
        if tau.shape[1] == 0 or not bool(tau.any()):
            return tau.sum(0)
        # The exact minimum has to tell small singular values from rounding.
        work = tau.double() if self.steps == 0 else tau
        norms = work.flatten(1).square().sum(1)
        shares = torch.where(norms > 0, weights / norms.clamp(min=1e-30), 0.0).to(work)
        # The gradient of the sum is 2 (τ G − M): only these two matrices are needed, whatever the number of models.
        scaled = work * shares.sqrt()[:, None, None]
        gram = torch.einsum("moi,moj->ij", scaled, scaled)
        target = torch.zeros_like(work[0])
        for one, part in zip(work, scaled, strict=True):
            target += one @ (part.T @ part)
        start = work.sum(0)
        if self.steps == 0:
            return _solved(gram, target, start).to(tau)
        value = start.clone().requires_grad_(True)
        rate = self.rate * (float(tau.square().mean()) ** 0.5 if self.relative else 1.0)
        optimiser = torch.optim.Adam([value], lr=rate)
        for _ in range(self.steps):
            value.grad = 2 * (value.detach() @ gram - target)
            optimiser.step()
        return value.detach()


def _solved(gram: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """The X nearest to ``start`` with X G = M, for positive semidefinite G."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values[-1] * len(values) * 1e-12
    basis = vectors[:, kept]
    off: Tensor = start - (start @ basis) @ basis.T
    found: Tensor = off + (target @ basis / values[kept]) @ basis.T
    return found


def input_dim(models: Models, name: str, tensor: Tensor) -> int | None:
    """The dim that a weight is summed over, as the wiring saw it; None for what is no weight of a linear operation."""
    if tensor.dim() < 2:
        return None
    wiring = models.wiring
    if wiring is not None and wiring.roles:
        return wiring.reads.get(name) if wiring.roles.get(name) == "weight" else None
    return 1


def as_matrices(stack: Tensor, dim: int) -> Tensor:
    """Weights (models, *shape) as matrices (models, outputs, inputs): inputs are ``dim`` and the kernel positions."""
    moved = stack.movedim(dim + 1, 2) if stack.dim() > 2 else stack
    return moved.flatten(2)


def from_matrix(matrix: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """The weight of a shape that a matrix (outputs, inputs) stands for: the inverse of `as_matrices`."""
    order = [d for d in range(len(shape)) if d != dim]
    order.insert(1, dim)
    weight: Tensor = matrix.reshape([shape[d] for d in order]).movedim(1, dim)
    return weight

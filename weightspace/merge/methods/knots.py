"""LoRA updates brought into one basis before they are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from weightspace.errors import MergeError
from weightspace.merge.method import Merger, Models, Prepared, Tensor, TwoPass, in_range

if TYPE_CHECKING:
    from weightspace.checkpoint import Checkpoint


@dataclass(frozen=True)
class Knots(Prepared):
    """Any other method on the parts of task vectors in a basis they share (Stoica et al. 2025, "KnOTS").

    With [ΔW₁ … ΔWₙ] = U Σ [V₁ᵀ … Vₙᵀ] by one singular value decomposition per weight, ``method`` merges the Σ Vᵢᵀ, and
    the result is W₀ + U merged(Σ Vᵢᵀ). Per tensor, as in the original for the basis; the original trims over the whole
    model, here ``method`` sees one tensor at a time too. Convolutions are matrices (outputs, everything else); vectors
    are merged as they are. Methods that are linear in the task vectors are not changed by it.

    Models are PEFT folders of LoRA adapters, or whole ones of which the changes have a low rank (`adapted` gives them
    from adapters and their base without loss). ``tolerance``: singular values below this share of the largest are
    dropped (at least 1e-7, as precise as their squares allow).

    ``method`` and ``options``: a method without data and its hyper-parameters (TIES by default, with density 0.2 and
    scale 0.6 as in the paper's vision experiments).
    """

    method: str = "ties"
    options: Mapping[str, Any] = field(default_factory=lambda: {"density": 0.2, "scale": 0.6})
    tolerance: float = 1e-5

    name: ClassVar[str] = "knots"
    paper: ClassVar[str] = "Stoica et al. (2025), Model merging with SVD to tie the KnOTS"
    needs_base: ClassVar[bool] = True

    def check(self, count: int) -> None:
        from weightspace.merge.methods import make

        in_range(self.tolerance, 1e-7, 1, "tolerance")
        inner = make(self.method, **self.options)
        if isinstance(inner, Prepared):
            raise MergeError(f"knots merges inside a basis with methods that need tensors alone; {inner.name} does not")
        if isinstance(inner, TwoPass) and inner.scope == "model":
            raise MergeError(f"knots merges tensor by tensor; {inner.name} was asked to look at the whole model")
        inner.check(count)

    def prepare(self, models: Models) -> Merger:
        def inner(name: str, parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
            from weightspace.merge.entry import merge as run

            zero = {name: torch.zeros_like(parts[0])}
            given = [{name: p} for p in parts]
            found = run(given, self.method, zero, weights=weights, seed=models.seed, threads=1, **self.options)
            return found.open()[name]

        def merge(name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
            assert base is not None
            tau = [t - base for t in tensors]
            if base.dim() < 2 or not any(bool(t.any()) for t in tau):
                return base + inner(name, tau, weights)
            u, parts = basis(tau, self.tolerance)
            return base + (u @ inner(name, parts, weights)).view_as(base)

        return merge


def basis(tau: Sequence[Tensor], tolerance: float) -> tuple[Tensor, list[Tensor]]:
    """U (outputs, k) and the Σ Vᵢᵀ (k, rest) of changes (outputs, …): τᵢ = U Σ Vᵢᵀ up to ``tolerance``."""
    wide = [t.flatten(1).to(torch.float64) for t in tau]
    rows, columns = len(wide[0]), sum(w.shape[1] for w in wide)
    if rows <= columns:
        # From the (outputs, outputs) second moments, which are much smaller than everything side by side.
        squares, u = torch.linalg.eigh(sum((w @ w.T for w in wide), torch.zeros((), dtype=torch.float64)))
        u, s = u.flip(1), squares.clamp(min=0).sqrt().flip(0)
    else:
        u, s, _ = torch.linalg.svd(torch.cat(wide, 1), full_matrices=False)
    u = u[:, s > s[0] * tolerance]
    return u.to(tau[0]), [(u.T @ w).to(tau[0]) for w in wide]


def adapted(adapters: Sequence[Any], base: Any) -> list[Checkpoint]:
    """Models for `Knots`: a base with each LoRA adapter put in, in float32 so that changes keep their rank; lazy.

    ``adapters``: PEFT folders (paths or opened). ``base``: a path, Checkpoint or mapping of tensors. Raises
    `CheckpointError` for other kinds of adapters and for those of another base.
    """
    from weightspace.checkpoint import Checkpoint, from_tensors
    from weightspace.checkpoint import open as open_checkpoint
    from weightspace.checkpoint.checkpoint import from_entries
    from weightspace.checkpoint.contents import Entry
    from weightspace.checkpoint.peft import merge_adapter

    if isinstance(base, Checkpoint):
        opened = base
    else:
        opened = from_tensors(base) if isinstance(base, Mapping) else open_checkpoint(base)

    def widened(name: str) -> Entry:
        dtype = opened.dtype(name)
        wide = torch.float32 if dtype.is_floating_point and dtype != torch.float64 else dtype
        return Entry(opened.shape(name), wide, lambda: opened[name].to(wide))

    wide = from_entries({n: widened(n) for n in opened}, opened.format, dict(opened.metadata), opened.config)
    return [merge_adapter(a if isinstance(a, Checkpoint) else open_checkpoint(a), wide) for a in adapters]

"""What was done to a parent to make a child: read off the difference, tensor by tensor.

- *copy*: equal values, whatever the format, up to the last digits (as where symmetries were undone);
- *converted*: the parent's values rounded to the child's dtype (or to one that its values all have, where a file was
  converted back);
- *quantised*: the child's values lie on a lattice (whole multiples of a step per tensor, per row or per block of 32 or
  64 values, or few levels per tensor), and are where rounding the parent to it leads;
- *low rank*: every changed matrix differs by one of low rank, as a LoRA adapter merged into its base (Hu et al. 2021,
  "LoRA: low-rank adaptation of large language models");
- *part*: most weights are untouched, some tensors changed (a new head, frozen layers);
- *fine-tuned*: anything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["copy", "converted", "quantised", "low rank", "part", "fine-tuned", "merge", "moved copy", "adapter"]

_HALVES = (torch.bfloat16, torch.float16)
_RANK_SHARE = 0.25
"""A difference counts as one of low rank up to this share of the smaller side."""
_SIDE = 4096
_LATTICES = (127, 7, 128, 8, 3, 1)
_BLOCKS = (0, -1, 32, 64)
_AGREE = 0.98


@dataclass(frozen=True)
class Step:
    """``kind`` and in words ``detail``; ``changed`` of ``tensors`` differ; ``rank``: of the largest change, if low."""

    kind: Kind
    detail: str
    changed: int
    tensors: int
    rank: int | None = None


def step(parent: Mapping[str, Tensor], child: Mapping[str, Tensor], names: Sequence[str]) -> Step:
    """What leads from one network to another; ``names`` of the tensors that are compared, of equal shapes."""
    rounded = same_but_rounded(parent, child, names)
    if rounded is not None:
        return rounded
    changed = [n for n in names if not torch.equal(parent[n].float(), child[n].float())]
    rank = low_rank(parent, child, changed)
    if rank is not None:
        said = f"{len(changed)} tensors differ by matrices of rank {rank} or less, as a merged LoRA adapter"
        return Step("low rank", said, len(changed), len(names), rank)
    total = sum(child[n].numel() for n in names)
    moved = sum(child[n].numel() for n in changed)
    if len(changed) < len(names) and moved <= 0.5 * total:
        few = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        return Step("part", f"only {few} changed, {moved / total:.0%} of the weights", len(changed), len(names))
    return Step("fine-tuned", f"{len(changed)} of {len(names)} tensors changed", len(changed), len(names))


def same_but_rounded(
    parent: Mapping[str, Tensor], child: Mapping[str, Tensor], names: Sequence[str]
) -> Step | None:
    """A copy, a conversion or a quantisation of the parent; None where values were changed otherwise."""
    changed = [n for n in names if not torch.equal(parent[n].float(), child[n].float())]
    if not changed:
        wide = [sum(_wider(x[n], y[n]) for n in names) for x, y in ((parent, child), (child, parent))]
        if wide[1]:
            return None
        if wide[0]:
            return Step("converted", "rounded to float32", wide[0], len(names))
        return Step("copy", "the same values", 0, len(names))
    if all(_last_digits(parent[n], child[n]) for n in changed):
        return Step("copy", "the same values up to the last digits", len(changed), len(names))
    rounded = _rounding(parent, child, changed)
    if rounded is not None:
        return Step("converted", f"rounded to {str(rounded).removeprefix('torch.')}", len(changed), len(names))
    lattice = quantised(parent, child, changed)
    return Step("quantised", lattice, len(changed), len(names)) if lattice else None


def _wider(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor has digits that float32 has not, and the other one not."""
    if torch.float64 not in (one.dtype, other.dtype):
        return False
    return not torch.equal(one.double(), one.float().double()) and torch.equal(other.double(), other.float().double())


def _last_digits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by no more than what dividing and multiplying again leaves in float32."""
    a, b = one.to(torch.float64), other.to(torch.float64)
    return torch.allclose(a, b, rtol=4e-6, atol=1e-6 * float(a.square().mean().sqrt()))


def _rounding(parent: Mapping[str, Tensor], child: Mapping[str, Tensor], changed: Sequence[str]) -> torch.dtype | None:
    for half in _HALVES:
        if all(_is_rounded(parent[n], child[n], half) for n in changed):
            return half
    return None


def _is_rounded(parent: Tensor, child: Tensor, half: torch.dtype) -> bool:
    if parent.dtype == child.dtype and parent.dtype in _HALVES:
        return False
    # Converters that go by another way round some values to the other neighbour.
    same = parent.to(half).float() == child.float()
    return bool(torch.equal(child.float(), child.to(half).float())) and float(same.float().mean()) >= _AGREE


def quantised(parent: Mapping[str, Tensor], child: Mapping[str, Tensor], changed: Sequence[str]) -> str:
    """How the child's matrices lie on a lattice that the parent was rounded to; empty if they do not."""
    matrices = [n for n in changed if child[n].dim() >= 2 and child[n].numel() >= 64]
    if not matrices:
        return ""
    for levels in _LATTICES:
        for block in _BLOCKS:
            if all(_on_lattice(parent[n].float(), child[n].float(), levels, block) for n in matrices):
                per = {0: "tensor", -1: "row"}.get(block, f"{block} values")
                return f"rounded to {2 * levels + 1} levels per {per}"
    counts = [_few_levels(parent[n].float(), child[n].float()) for n in matrices]
    return f"rounded to {max(counts)} levels per tensor" if all(counts) else ""


def _on_lattice(parent: Tensor, child: Tensor, levels: int, block: int) -> bool:
    rows = _blocks(child, block)
    if rows is None:
        return False
    size = rows.abs().amax(1, keepdim=True)
    unit = torch.where(size > 0, size / levels, torch.ones_like(size))
    whole = rows / unit
    if float((whole - whole.round()).abs().max()) > 0.02:
        return False
    theirs = _blocks(parent, block)
    # Half a step, and what the rounding of the step itself does to the largest values.
    near = None if theirs is None else ((theirs - rows) / unit).abs() <= 0.55 + 0.01 * levels / 8
    return near is not None and float(near.float().mean()) >= _AGREE


def _blocks(x: Tensor, block: int) -> Tensor | None:
    if block == 0:
        return x.reshape(1, -1)
    if block == -1:
        return x.reshape(x.shape[0], -1)
    return x.reshape(-1, block) if x.numel() % block == 0 else None


def _few_levels(parent: Tensor, child: Tensor) -> int:
    """Number of distinct values, if few, where each is nearest to the parent's; else 0."""
    levels = child.unique()
    if len(levels) > 256 or len(levels) > child.numel() // 4:
        return 0
    middle = (levels[1:] + levels[:-1]) / 2
    nearest = levels[torch.bucketize(parent.reshape(-1), middle)]
    return len(levels) if float((nearest == child.reshape(-1)).float().mean()) >= _AGREE else 0


def low_rank(parent: Mapping[str, Tensor], child: Mapping[str, Tensor], changed: Sequence[str]) -> int | None:
    """The largest rank of the tensors' differences; None where one of them is not of low rank, or no matrix."""
    ranks = []
    for n in changed:
        one, other = parent[n].to(torch.float32), child[n].to(torch.float32)
        if one.dim() < 2:
            return None
        # A kernel of a convolution is unfolded along its outputs, as adapters of convolutions are made.
        delta = (other - one).flatten(1)
        side = min(delta.shape)
        most = int(_RANK_SHARE * side)
        if most < 1 or side > _SIDE or not delta.isfinite().all():
            return None
        epsilon = max(torch.finfo(t.dtype).eps for t in (parent[n], child[n]))
        noise = 4 * epsilon * float(other.abs().max()) * math.sqrt(max(delta.shape))
        values = torch.linalg.svdvals(delta.to(torch.float64))
        rank = int((values > max(noise, 1e-4 * float(values[0]))).sum())
        if rank > most or rank == 0:
            return None
        ranks.append(rank)
    return max(ranks) if ranks else None


__all__ = ["Kind", "Step", "low_rank", "quantised", "same_but_rounded", "step"]

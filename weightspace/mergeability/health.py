"""One pass over the tensors of models that are to be merged: values that are broken, collapsed or out of scale.

Tensors are read one at a time, of all models the one of a name, so that memory stays at a few tensors however large the
models are. What is looked for:

- values that are not finite;
- collapsed tensors: all zero or constant; rows or columns that are zero (dead units) where the reference's are not; a
  matrix whose effective rank (Roy & Vetterli 2007, the exponential of the entropy of its singular values) is a fraction
  of the reference's;
- scaled tensors: the ratio of norms to the reference's is an outlier among those of the other tensors;
- equal tensors, and so equal models.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from weightspace.checkpoint import Checkpoint

BASE = "base"
"""What the reference is called in ``Health.broken``."""
RANK_SHARE = 0.5
"""A matrix whose effective rank is below this share of the reference's has collapsed."""
SCALED = math.log(1.5)
"""Least deviation of a log norm ratio from the median over tensors that is spoken of ..."""
SCALED_SPREADS = 8.0
"""... and least number of robust standard deviations (1.4826 times the median absolute deviation)."""
_RANK_ROWS = 512


@dataclass(frozen=True)
class TensorHealth:
    """What one tensor of one model looks like; norms are in float64, ``rank`` is None where it was not taken."""

    finite: bool
    broken: int
    norm: float
    constant: bool
    zero_slices: tuple[int, ...]
    rank: float | None
    digest: str


@dataclass(frozen=True)
class Health:
    """What the pass found: model name -> tensors, worded by ``preflight``.

    ``broken``: tensor -> number of values that are not finite. ``constant``: tensors that are all one value (zero
    included) where the reference's are not. ``dead``: tensor -> slices that are zero where the reference's are not.
    ``collapsed``: tensor -> (effective rank, the reference's). ``scaled``: tensor -> (norm ratio to the reference,
    median ratio). ``digests``: one per model, equal for equal weights; ``shared``: share of parameters in tensors
    equal to the reference's.
    """

    broken: Mapping[str, Mapping[str, int]]
    constant: Mapping[str, tuple[str, ...]]
    dead: Mapping[str, Mapping[str, int]]
    collapsed: Mapping[str, Mapping[str, tuple[float, float]]]
    scaled: Mapping[str, Mapping[str, tuple[float, float]]]
    digests: Mapping[str, str]
    shared: Mapping[str, float]


@dataclass
class _Tally:
    broken: dict[str, int] = field(default_factory=dict)
    constant: list[str] = field(default_factory=list)
    dead: dict[str, int] = field(default_factory=dict)
    collapsed: dict[str, tuple[float, float]] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    digest: dict[str, str] = field(default_factory=dict)
    shared: int = 0
    total: int = 0


def examine(models: Mapping[str, Checkpoint], reference: Checkpoint | None = None) -> Health:
    """Read all models once, tensor by tensor. Without a ``reference`` each is held against the others' median."""
    tallies = {name: _Tally() for name in models}
    broken_base: dict[str, int] = {}
    names = list(dict.fromkeys(n for m in models.values() for n in m))
    for tensor in names:
        held = reference is not None and tensor in reference
        base = look(reference[tensor]) if held and reference is not None else None
        if base is not None and base.broken:
            broken_base[tensor] = base.broken
        looked = {m: look(c[tensor]) for m, c in models.items() if tensor in c}
        for model, found in looked.items():
            others = [f for m, f in looked.items() if m != model]
            _tally(tallies[model], tensor, found, base, others, models[model].shape(tensor))
    return Health(
        broken={m: t.broken for m, t in tallies.items()} | ({BASE: broken_base} if broken_base else {}),
        constant={m: tuple(t.constant) for m, t in tallies.items()},
        dead={m: t.dead for m, t in tallies.items()},
        collapsed={m: t.collapsed for m, t in tallies.items()},
        scaled={m: outliers(t.ratios) for m, t in tallies.items()},
        digests={m: _joined(t.digest) for m, t in tallies.items()},
        shared={m: t.shared / t.total if t.total else 0.0 for m, t in tallies.items()},
    )


def look(tensor: torch.Tensor) -> TensorHealth:
    """One tensor. Ranks are taken of at most 512 rows, in float32."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if not tensor.is_floating_point() or not tensor.numel():
        return TensorHealth(True, 0, 0.0, False, (), None, digest.hexdigest())
    x = tensor.detach().to(torch.float32) if tensor.dtype.itemsize < 4 else tensor.detach()
    broken = int((~torch.isfinite(x)).sum())
    if broken:
        x = x.nan_to_num(0, 0, 0)
    norm = float(torch.linalg.vector_norm(x, dtype=torch.float64))
    first = x.reshape(-1)[0]
    constant = x.numel() > 1 and bool((x == first).all())
    zeros: tuple[int, ...] = ()
    rank = None
    if x.dim() >= 2:
        rows = x.flatten(1)
        zeros = (_zeros(rows), _zeros(x.transpose(0, 1).flatten(1)))
        if min(rows.shape) >= 4 and norm > 0:
            rank = effective_rank(rows)
    return TensorHealth(not broken, broken, norm, constant, zeros, rank, digest.hexdigest())


def _zeros(rows: torch.Tensor) -> int:
    return int((rows.abs().amax(1) == 0).sum())


def effective_rank(matrix: torch.Tensor) -> float:
    """``exp(entropy of the singular values' shares)`` of evenly chosen rows and columns, ``(rows, columns)``."""
    for dim in (0, 1):
        if matrix.shape[dim] > _RANK_ROWS:
            chosen = torch.linspace(0, matrix.shape[dim] - 1, _RANK_ROWS).long()
            matrix = matrix.index_select(dim, chosen)
    values = torch.linalg.svdvals(matrix.to(torch.float32))
    share = values / values.sum().clamp_min(1e-30)
    return float(torch.exp(-(share * share.clamp_min(1e-30).log()).sum()))


def outliers(ratios: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Tensors whose norm ratio stands out among those of the others: ``name -> (ratio, median ratio)``."""
    logs = {n: math.log(r) for n, r in ratios.items() if r > 0 and math.isfinite(r)}
    if len(logs) < 3:
        return {}
    values = torch.tensor(list(logs.values()), dtype=torch.float64)
    middle = float(values.median())
    spread = 1.4826 * float((values - middle).abs().median())
    limit = max(SCALED, SCALED_SPREADS * spread)
    return {n: (ratios[n], math.exp(middle)) for n, v in logs.items() if abs(v - middle) > limit}


def _tally(
    tally: _Tally, name: str, found: TensorHealth, base: TensorHealth | None, others: Sequence[TensorHealth],
    shape: tuple[int, ...],
) -> None:  # fmt: skip
    count = math.prod(shape)
    tally.total += count
    tally.digest[name] = found.digest
    if found.broken:
        tally.broken[name] = found.broken
    beside = [base] if base is not None else list(others)
    if found.constant and beside and not any(o.constant for o in beside):
        tally.constant.append(name)
    if not beside:
        if found.constant and len(shape) >= 2:
            tally.constant.append(name)
        return
    if base is not None and base.digest == found.digest:
        tally.shared += count
    if found.zero_slices and all(o.zero_slices for o in beside):
        least = [min(o.zero_slices[d] for o in beside) for d in (0, 1)]
        more = max(found.zero_slices[d] - least[d] for d in (0, 1))
        if more > 0 and not found.constant:
            tally.dead[name] = more
    ranks = sorted(o.rank for o in beside if o.rank is not None)
    if found.rank is not None and ranks and not found.constant:
        usual = ranks[len(ranks) // 2]
        if usual >= 4 and found.rank < RANK_SHARE * usual:
            tally.collapsed[name] = (found.rank, usual)
    norms = sorted(o.norm for o in beside if o.norm > 0)
    # Vectors near zero (fresh biases) grow by any factor in training; only what the function is made of counts.
    if norms and found.norm > 0 and len(shape) >= 2:
        tally.ratios[name] = found.norm / norms[len(norms) // 2]


def _joined(digests: Mapping[str, str]) -> str:
    joined = hashlib.sha256()
    for name in sorted(digests):
        joined.update(f"{name}\0{digests[name]}\n".encode())
    return joined.hexdigest()


__all__ = [
    "BASE", "RANK_SHARE", "SCALED", "SCALED_SPREADS", "Health", "TensorHealth", "effective_rank", "examine", "look",
    "outliers",
]  # fmt: skip
